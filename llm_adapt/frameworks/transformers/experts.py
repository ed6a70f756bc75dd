"""The experts of transformers: their default implementation, "grouped_mm", on our operators.

hidden_states [T, H], top_k_index and top_k_weights [T, K], weights [E, ., .]; T = tokens, K = experts a token, E =
experts here, R = T K rows, H = hidden size, I = inner size.

moe_permute sorts the rows by expert, grouped_gemm multiplies, the module's own `_apply_gate` (or act_fn) stands between
the two products, and moe_unpermute weighs and adds up. What a module says of itself is honoured: is_transposed,
has_bias, has_gate, has_post_expert_norm, `_is_expert_parallel` (indices of E or more belong to other ranks: no row);
is_concatenated is what its `_apply_gate` does. A gate that is recognised by its numbers becomes `glu`.

Tokens of expert parallelism have fewer than K rows here; else the operators are told that there are K each, which is
what routers choose. The reference and the kernels of torch do not rely on it: an expert chosen twice counts twice.

They are in place where a kernel library of the device has a grouped product of its own. Elsewhere both sides call
torch's, transformers with less around it, so its code stays, and the report says so.

The original also serves, with a line in the report: tensors of other types (DTensor), weights in a dtype or under a
compiler for which no kernel of grouped_gemm serves, since the reference multiplies all rows by each expert.

Rounding: the rows of a token are weighed and added up in float32 and rounded once; transformers rounds each product.
Source: integrations/moe.py of transformers 5.23 and 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import MODEL_FILES, VERSIONS
from llm_adapt.patching import Patch, PlanItem, Survey

__all__ = ["grouped_experts", "rows"]

_MODULE = "transformers.integrations.moe"
_WEIGHTS = {True: ("gate_up_proj", "down_proj"), False: ("up_proj", "down_proj")}
_TORCHS = ("torch_native", "chunked")  # libraries made of torch's own operators
Experts = Callable[..., Any]


def rows(context: Context) -> list[PlanItem]:
    """The default experts, their default gate, and gates of model files that are recognised."""
    return [
        Survey(("transformers.integrations.moe",), lambda module: _interface(context), "experts call the operators"),
        Survey(MODEL_FILES, lambda module: _gates(context, module), "gates of experts call glu"),
    ]


def _interface(context: Context) -> Iterator[Patch]:
    """What all experts share."""
    from llm_adapt.frameworks.transformers.activations import reporter
    from llm_adapt.frameworks.transformers.gates import default_gate

    tell = reporter(context.report)
    versions: dict[str, Any] = {"kind": "wrap", "versions": VERSIONS}
    library = _library(context.adapter.kernel_libraries)
    if library:
        yield Patch(
            f"{_MODULE}:grouped_mm_experts_forward",
            lambda original: grouped_experts(original, tell),
            f"the default experts call moe_permute, grouped_gemm and moe_unpermute: {library} has kernels",
            fingerprints={"5.23 and 5.24": "0da742d376df"},
            **versions,
        )
    else:
        why = "no kernel library here has a grouped product of its own; around torch's, transformers' code is faster"
        context.report.once("transformers: grouped_mm experts", "their own code", why)
    yield Patch(
        f"{_MODULE}:_default_apply_gate",
        lambda original: default_gate(original, tell),
        "the gate of experts calls glu",
        fingerprints={"5.23 and 5.24": "3633b092fccf"},
        **versions,
    )


def _library(libraries: Iterable[str]) -> str:
    """The first library with a grouped product of its own; "" when there is none.

    torch's is what transformers calls by itself.
    """
    from llm_adapt.ops.dispatch.registry import load_library
    from llm_adapt.ops.grouped_gemm import grouped_gemm

    for library in libraries:
        is_there = library not in _TORCHS and not load_library(library)
        if is_there and library in grouped_gemm.op.kernels:  # type: ignore[attr-defined]
            return library
    return ""


def _gates(context: Context, module: ModuleType) -> Iterator[Patch]:
    """The gates that a model file defines."""
    own = [cls for cls in list(vars(module).values()) if isinstance(cls, type) and cls.__module__ == module.__name__]
    own = [cls for cls in own if isinstance(vars(cls).get("_apply_gate"), FunctionType)]
    # The default, which use_experts_implementation gives to a class, has a row of its own.
    own = [cls for cls in own if vars(cls)["_apply_gate"].__module__ == module.__name__]
    if not own:
        return
    from llm_adapt.frameworks.transformers.gates import gate, recognise

    for cls in own:
        name, form = f"{module.__name__}:{cls.__qualname__}._apply_gate", recognise(cls)
        if form is None:
            context.report.once(name, "its own code", "no gate that glu computes")
        else:
            yield Patch(name, gate(cls, form), str(form), rebind=False)


def grouped_experts(original: Experts, tell: Callable[[str, str, str], None]) -> Experts:
    """grouped_mm_experts_forward on the operators."""
    import torch

    from llm_adapt.ops.grouped_gemm import grouped_gemm
    from llm_adapt.ops.moe_permute import moe_permute
    from llm_adapt.ops.moe_unpermute import moe_unpermute

    def experts_forward(
        self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        experts: Any = self
        up_name, down_name = _WEIGHTS[bool(experts.has_gate)]
        up, down = getattr(experts, up_name), getattr(experts, down_name)
        why = _refusal(hidden_states, top_k_weights, up, down)
        if why:
            tell("transformers: grouped_mm experts", "its own code", why)
            return original(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        tokens, topk = top_k_index.shape
        is_whole = not experts._is_expert_parallel
        routing_map, probs = _routing(top_k_index, top_k_weights, experts.num_experts, is_whole)
        counts = routing_map.sum(0)
        hint = topk if is_whole else None
        rows, _, places = moe_permute(hidden_states, routing_map, tokens * topk, topk=hint)
        transposed = not experts.is_transposed
        up_bias = getattr(experts, f"{up_name}_bias") if experts.has_bias else None
        down_bias = getattr(experts, f"{down_name}_bias") if experts.has_bias else None
        rows = grouped_gemm(rows.to(up.dtype), up, counts, up_bias, transposed)
        rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
        rows = grouped_gemm(rows.to(down.dtype), down, counts, down_bias, transposed)
        if experts.has_post_expert_norm:
            rows = experts.post_expert_norm(rows)
        y = moe_unpermute(rows, places, tokens, probs, routing_map, topk=hint)
        return y.to(hidden_states.dtype)

    return experts_forward


def _routing(index: Any, weights: Any, experts: int, is_whole: bool) -> tuple[Any, Any]:
    """The map [T, E] of chosen experts and their weights [T, E]; indices of E or more choose none.

    Added, not written: an expert that a token names twice has one row, and both of its weights.
    """
    import torch

    columns = experts if is_whole else experts + 1
    probs = torch.zeros(index.shape[0], columns, dtype=weights.dtype, device=weights.device)
    index = index.long() if is_whole else index.long().clamp(max=experts)
    routing_map = torch.zeros_like(probs, dtype=torch.bool).scatter(1, index, True)
    return routing_map[:, :experts], probs.scatter_add(1, index, weights)[:, :experts]


def _refusal(hidden: Any, weights: Any, up: Any, down: Any) -> str:
    """Why the operators do not take a call; "" when they do."""
    import torch

    for tensor in (hidden, weights, up, down):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"takes plain tensors, not {type(tensor).__name__}"
    if up.dtype not in (torch.float32, torch.bfloat16, torch.float16) or down.dtype != up.dtype:
        return f"no kernel of grouped_gemm serves {up.dtype}"
    if torch.compiler.is_compiling() and (up.dtype != torch.bfloat16 or up.device.type not in ("cpu", "cuda")):
        return f"compiled code has no kernel of grouped_gemm for {up.dtype} on {up.device.type}"
    return ""
