"""torch.mlu.cncl: the twin of torch.cuda.nccl; which functions it has is not public."""

from __future__ import annotations

from typing import Any

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    raise AttributeError(f"torch.mlu.cncl.{name} is not recorded in public sources; use torch.distributed.")
