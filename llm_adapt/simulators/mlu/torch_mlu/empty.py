"""torch_mlu.utils: a package with nothing of its own."""
