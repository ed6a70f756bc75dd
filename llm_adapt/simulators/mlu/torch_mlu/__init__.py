"""torch_mlu of the simulator: registers the device "mlu" with torch, and torch.mlu.

The names, signatures and limits are those that public sources record of torch_mlu (Cambricon/torch_mlu d578002 of
2024-09, the Python part of a 2026 build, and records made on MLU590); a name that they do not record is not here.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

if "triton" in sys.modules and getattr(sys.modules["triton"], "__spec__", None) is not None:
    # FlagOS's record on MLU590: the MLU driver of triton fails unless torch_mlu was imported before it.
    raise ImportError("triton was imported before torch_mlu, and its MLU driver needs torch_mlu first. Swap the two.")

import torch
import torch.utils.backend_registration

torch.utils.backend_registration.rename_privateuse1_backend("mlu")

importlib.import_module("torch_mlu._native")  # once the device has its name

from . import backends as _backends  # noqa: E402
from . import distributed as _distributed  # noqa: E402
from . import mlu as mlu  # noqa: E402
from . import operators as _operators  # noqa: E402
from . import tensors as _tensors  # noqa: E402

__version__ = f"0.0.0+torch{torch.__version__.partition('+')[0]}"


def _register() -> None:
    torch._register_device_module("mlu", mlu)
    unsupported = [torch.quint8, torch.quint4x2, torch.quint2x4, torch.qint32, torch.qint8]
    torch.utils.backend_registration.generate_methods_for_privateuse1_backend(
        for_tensor=False, for_module=True, for_storage=False, unsupported_dtype=unsupported
    )
    from torch.utils.checkpoint import DefaultDeviceType

    DefaultDeviceType.set_device_type("mlu")
    torch.version.mlu = None  # type: ignore[attr-defined]


_tensors.register()
_register()
_backends.register()
_distributed.register()
_operators.register()


def init() -> None:
    """The entry point by which torch >= 2.5 loads the package: importing it was all."""


def __getattr__(name: str) -> Any:
    raise AttributeError(f"torch_mlu.{name} is not recorded in public sources; the MLU simulator does not have it.")


mlu.migrate_if_asked()
