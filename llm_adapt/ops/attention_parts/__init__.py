"""What the attention ops and their PyTorch kernels share: layouts, places, dropout, the softmax. No op stands here."""
