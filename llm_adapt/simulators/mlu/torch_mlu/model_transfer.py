"""torch_mlu.utils.model_transfer: the old name of gpu_migration."""

import warnings

from torch_mlu.utils.gpu_migration import migration as transfer

__all__ = ["transfer"]

warnings.warn(
    "torch_mlu.utils.model_transfer is deprecated, use torch_mlu.utils.gpu_migration.", FutureWarning, stacklevel=2
)
