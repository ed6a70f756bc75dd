"""torch.mlu.graphs: the names are there on an MLU; the simulator captures nothing and says so."""

from __future__ import annotations

from typing import Any

__all__ = ["MLUGraph", "graph", "graph_pool_handle", "is_current_stream_capturing", "make_graphed_callables"]


def _refuse(name: str) -> NotImplementedError:
    return NotImplementedError(f"torch.mlu.{name}: the MLU simulator captures no graphs. Run without them.")


class MLUGraph:
    """Not modelled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise _refuse("MLUGraph")


class graph:
    """Not modelled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise _refuse("graph")


def graph_pool_handle() -> Any:
    """Not modelled."""
    raise _refuse("graph_pool_handle")


def make_graphed_callables(*args: Any, **kwargs: Any) -> Any:
    """Not modelled."""
    raise _refuse("make_graphed_callables")


def is_current_stream_capturing() -> bool:
    """False: nothing is ever captured."""
    return False
