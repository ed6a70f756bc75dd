"""What torch's UntypedStorage does for CUDA in C++ that a CPU build leaves out: to be made, and to be resized."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["teach_storages"]


def teach_storages(library: Any) -> None:
    """Let torch.UntypedStorage(size, device="cuda") and .resize_ work.

    Args:
        library: the simulator's extension module.
    """
    base: Any = torch._C.StorageBase

    def new(cls: type, *arguments: Any, device: Any = None, **keywords: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            given = {} if device is None else {"device": device}
            return base.__new__(cls, *arguments, **given, **keywords)
        if keywords or len(arguments) > 1:
            raise TypeError(f"UntypedStorage on cuda takes a size or numbers; {arguments} and {keywords} were given.")
        numbers = arguments[0] if arguments else 0
        if isinstance(numbers, int):
            return torch.empty(numbers, dtype=torch.uint8, device=device).untyped_storage()
        return torch.tensor(numbers, dtype=torch.uint8, device=device).untyped_storage()

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            base.resize_(storage, size)
        else:
            library.resize_storage(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), size)
        return storage

    torch.UntypedStorage.__new__ = new  # type: ignore[method-assign, assignment]
    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
