"""llm_adapt: one CUDA-written LLM script on CUDA, Ascend NPU, Cambricon MLU, Hygon DCU and the CPU.

    import llm_adapt
    llm_adapt.patch()

Importing this package changes nothing and does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "current_adapter", "is_patched", "patch", "patched", "report", "unpatch"]

if TYPE_CHECKING:
    from llm_adapt.session import current_adapter, is_patched, patch, patched, report, unpatch


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llm_adapt import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
