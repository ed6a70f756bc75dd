"""Cases: the calls that large models make of each op, and how they are narrowed on a machine that is slow.

Every case names its axes. `full` are the sizes of the model at 4096 tokens, on one device; `cpu` and `quick` keep the
axes that make the kernel (hidden size, head size, vocabulary) where they can, and have fewer tokens, heads or experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llm_adapt.ops.dispatch.registry import FusedOp, all_ops

__all__ = ["CASES", "SWEEP", "Case", "Scale", "cases_of"]

Scale = Literal["full", "cpu", "quick"]
Make = Callable[..., dict[str, Any]]  # (generator, dtype, *sizes) -> arguments
_SMALL = {"full": 2**62, "cpu": 2**21, "quick": 2**18}  # elements of the first tensor of an op that is not listed


@dataclass(frozen=True)
class Case:
    """One call of an op at the shapes of a model.

    Attributes:
        axes: names of the sizes, in the order in which `make` takes them.
        make: (generator, dtype, *sizes) -> arguments of the call.
    """

    op: str
    model: str
    axes: tuple[str, ...]
    full: tuple[int, ...]
    cpu: tuple[int, ...]
    quick: tuple[int, ...]
    make: Make

    def sizes(self, scale: Scale) -> tuple[int, ...]:
        """The sizes at a scale."""
        return {"full": self.full, "cpu": self.cpu, "quick": self.quick}[scale]

    def scaled(self, scale: Scale) -> str:
        """What was narrowed, in words: "tokens 256 of 4096"; "" when nothing was."""
        triples = zip(self.axes, self.sizes(scale), self.full, strict=True)
        return ", ".join(f"{axis} {size} of {whole}" for axis, size, whole in triples if size != whole)

    def arguments(self, op: FusedOp, dtype: torch.dtype, scale: Scale, device: str = "cpu") -> dict[str, Any]:
        """All of the op's arguments, made from a fixed seed; on an accelerator others than on the CPU, and sooner."""
        with torch.device(device):
            return op.bind(**self.make(torch.Generator(device).manual_seed(0), dtype, *self.sizes(scale)))


def _draw(g: torch.Generator, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=g).to(dtype)


def _norm(*names: str, **options: Any) -> Make:
    def make(g: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int) -> dict[str, Any]:
        rows = {name: _draw(g, dtype, 1, tokens, hidden) for name in names}
        return rows | {"weight": torch.rand(hidden, generator=g).to(dtype)} | options

    return make


def _layer_norm(g: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int) -> dict[str, Any]:
    return _norm("x")(g, dtype, tokens, hidden) | {"bias": _draw(g, dtype, hidden)}


def _activation(g: torch.Generator, dtype: torch.dtype, tokens: int, width: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, tokens, 1, width), "bias": _draw(g, dtype, width), "function": "gelu_tanh"}


def _gate_and_up(g: torch.Generator, dtype: torch.dtype, tokens: int, width: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, 1, tokens, width), "up": _draw(g, dtype, 1, tokens, width)}


def _packed(g: torch.Generator, dtype: torch.dtype, tokens: int, width: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, tokens, 1, 2 * width)}


def _routed(g: torch.Generator, dtype: torch.dtype, rows: int, width: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, rows, 2 * width), "weights": torch.rand(rows, 1, generator=g)}


def _tables(g: torch.Generator, tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, size // 2, generator=g) * 6.28
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rope(layout: str, **options: Any) -> Make:
    """As frameworks call it: heads as a view of the projection's result, the tables in the dtype of x."""

    def make(g: torch.Generator, dtype: torch.dtype, tokens: int, heads: int, size: int) -> dict[str, Any]:
        cos, sin = (table.to(dtype) for table in _tables(g, tokens, size))
        x = _draw(g, dtype, *((tokens, 1) if layout == "sbhd" else (1, tokens)), heads, size)
        if layout == "bhsd":
            x, cos, sin = x.transpose(1, 2), cos[None], sin[None]
        return {"x": x, "cos": cos, "sin": sin, "layout": layout, "compute": "x"} | options

    return make


def _attention(layout: str) -> Make:
    def make(g: torch.Generator, dtype: torch.dtype, tokens: int, heads: int, kv: int, d: int, dv: int) -> Any:
        front = (tokens, 1) if layout == "sbhd" else (1, tokens)
        parts = {"q": (heads, d), "k": (kv, d), "v": (kv, dv)}
        tensors = {name: _draw(g, dtype, *front, *sizes) for name, sizes in parts.items()}
        if layout == "bhsd":  # as transformers has them: views of [B, S, H, D]
            tensors = {name: tensor.transpose(1, 2) for name, tensor in tensors.items()}
        return tensors | {"layout": layout, "causal": "bottom_right"}

    return make


def _decode(g: torch.Generator, dtype: torch.dtype, batch: int, cache: int, heads: int, kv: int, d: int) -> Any:
    lengths = torch.full((batch,), cache - cache // 16, dtype=torch.int32)
    caches = {name: _draw(g, dtype, batch, cache, kv, d) for name in ("k_cache", "v_cache")}
    return {"q": _draw(g, dtype, batch, 1, heads, d), **caches, "cache_seqlens": lengths}


def _logits(g: torch.Generator, dtype: torch.dtype, tokens: int, vocabulary: int) -> dict[str, Any]:
    return {"logits": _draw(g, dtype, tokens, vocabulary), "target": _targets(g, tokens, vocabulary)}


def _targets(g: torch.Generator, tokens: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (tokens,), generator=g)


def _head_and_loss(g: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int, vocabulary: int) -> Any:
    weight = (torch.randn(vocabulary, hidden, generator=g) * hidden**-0.5).to(dtype)
    return {"hidden": _draw(g, dtype, tokens, hidden), "weight": weight, "target": _targets(g, tokens, vocabulary)}


def _scores(g: torch.Generator, dtype: torch.dtype, heads: int, queries: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, 1, heads, queries, queries), "scale": 0.125, "causal": True}


def _dropout(g: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int) -> dict[str, Any]:
    x, residual, bias = (_draw(g, dtype, *sizes) for sizes in ((tokens, 1, hidden), (tokens, 1, hidden), (hidden,)))
    return {"x": x, "residual": residual, "bias": bias, "p": 0.1}


def _list(g: torch.Generator, dtype: torch.dtype, number: int, rows: int, columns: int) -> list[torch.Tensor]:
    return [_draw(g, dtype, rows, columns) for _ in range(number)]


def _adamw(g: torch.Generator, dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
    lists = {name: _list(g, dtype, *sizes) for name in ("params", "grads", "exp_avgs")}
    squares = [item.square() for item in lists["exp_avgs"]]
    return lists | {"exp_avg_sqs": squares, "weight_decay": 0.1, "step": 10}


def _one_list(name: str, **options: Any) -> Make:
    def make(g: torch.Generator, dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
        return {name: _list(g, dtype, *sizes)} | options

    return make


def _scale(g: torch.Generator, dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
    return {"tensors": _list(g, dtype, *sizes), "outputs": _list(g, torch.float32, *sizes), "scale": 0.5}


def _wgrad(g: torch.Generator, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> dict[str, Any]:
    x, dy = _draw(g, dtype, tokens, inputs), _draw(g, dtype, tokens, outputs)
    wide = torch.promote_types(dtype, torch.float32)
    return {"x": x, "dy": dy, "main_grad": torch.zeros(outputs, inputs, dtype=wide)}


def _grouped(g: torch.Generator, dtype: torch.dtype, rows: int, experts: int, inputs: int, outputs: int) -> Any:
    counts = torch.bincount(torch.randint(experts, (rows,), generator=g), minlength=experts)
    weight = (torch.randn(experts, outputs, inputs, generator=g) * inputs**-0.5).to(dtype)
    return {"x": _draw(g, dtype, rows, inputs), "weight": weight, "tokens_per_expert": counts, "transposed": True}


def _map(g: torch.Generator, tokens: int, experts: int, topk: int) -> torch.Tensor:
    chosen = torch.rand(tokens, experts, generator=g).topk(topk, dim=1).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)


def _permute(g: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int, experts: int, topk: int) -> Any:
    given = {"routing_map": _map(g, tokens, experts, topk), "num_out_tokens": tokens * topk, "topk": topk}
    return {"tokens": _draw(g, dtype, tokens, hidden), **given}


def _unpermute(g: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int, experts: int, topk: int) -> Any:
    routing_map = _map(g, tokens, experts, topk)
    rows = routing_map.t().nonzero()[:, 1].contiguous()
    given = {"probs": torch.rand(tokens, experts, generator=g), "routing_map": routing_map, "topk": topk}
    return {"permuted": _draw(g, dtype, tokens * topk, hidden), "sorted_indices": rows, "num_tokens": tokens, **given}


def _router(**options: Any) -> Make:
    """No two logits of a token are equal, in bfloat16 either: torch.topk gives equal ones in any order."""

    def make(g: torch.Generator, dtype: torch.dtype, tokens: int, experts: int) -> dict[str, Any]:
        ranks = torch.rand(tokens, experts, generator=g).argsort(dim=1)
        logits = ((ranks - experts // 2) * (8.0 / experts)).to(dtype)
        bias = {"expert_bias": torch.zeros(experts)} if "num_groups" in options else {}
        return {"logits": logits, "form": "indices", "renormalize": True, **bias, **options}

    return make


def _aux_loss(g: torch.Generator, dtype: torch.dtype, tokens: int, experts: int) -> dict[str, Any]:
    counts = torch.randint(1, 2 * tokens // experts + 2, (experts,), generator=g)
    probs = torch.rand(tokens, experts, generator=g).to(dtype)
    return {"probs": probs, "tokens_per_expert": counts, "coeff": 0.01, "num_tokens": tokens}


def _z_loss(g: torch.Generator, dtype: torch.dtype, tokens: int, experts: int) -> dict[str, Any]:
    return {"logits": _draw(g, dtype, tokens, experts), "coeff": 1e-3}


def _rows(g: torch.Generator, dtype: torch.dtype, rows: int, columns: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, rows, columns)}


def _blocks(g: torch.Generator, dtype: torch.dtype, rows: int, columns: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, rows, columns), "block": "1x128", "power_of_two": True}


def _int8(g: torch.Generator, dtype: torch.dtype, rows: int, columns: int) -> dict[str, Any]:
    q = torch.randint(-127, 128, (rows, columns), generator=g).to(torch.int8)
    return {"q": q, "scale": torch.rand(rows, generator=g), "dtype": dtype}


def _fp8(g: torch.Generator, dtype: torch.dtype, rows: int, columns: int) -> dict[str, Any]:
    q = torch.randn(rows, columns, generator=g).to(torch.float8_e4m3fn)
    return {"q": q, "scale_inv": torch.rand(rows, columns // 128, generator=g), "block": "1x128", "dtype": dtype}


def _linear(g: torch.Generator, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> dict[str, Any]:
    return {"x": _draw(g, dtype, tokens, inputs), "weight": _draw(g, dtype, outputs, inputs)}


def _linear_int8(g: torch.Generator, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> dict[str, Any]:
    weight = torch.randint(-127, 128, (outputs, inputs), generator=g).to(torch.int8)
    return {"x": _draw(g, dtype, tokens, inputs), "weight": weight, "weight_scale": torch.rand(outputs, generator=g)}


def _history(g: torch.Generator, dtype: torch.dtype, steps: int, tensors: int) -> dict[str, Any]:
    return {"amax_history": torch.rand(steps, tensors, generator=g), "scale": torch.ones(tensors)}


_TH = ("tokens", "hidden")
_HS = ("tokens times heads", "head size")
_TW = ("tokens", "width")
_TV = ("tokens", "vocabulary")
_THS = ("tokens", "heads", "head size")
_QKV = ("tokens", "heads", "key heads", "head size", "value size")
_TIO = ("tokens", "inputs", "outputs")
_LIST = ("tensors", "rows", "columns")
_MOE = ("tokens", "hidden", "experts", "experts a token")
_TE = ("tokens", "experts")
_RC = ("rows", "columns")
_MIXTRAL_ROUTER = _router(topk=2, probs_dtype=torch.float32)
_DEEPSEEK_ROUTER = _router(
    topk=8, score_function="sigmoid", scaling_factor=2.5, num_groups=8, group_topk=4, scores_per_group=2,
    probs_dtype=torch.float32,
)  # fmt: skip
_ADD = _norm("x", "residual", form="cast_first")
_L8, _Q72, _MX, _DS, _GPT = "Llama-3-8B", "Qwen2.5-72B", "Mixtral-8x7B", "DeepSeek-V3", "GPT-3 6.7B"
CASES = (
    Case("activation", _GPT, _TW, (4096, 16384), (256, 16384), (32, 16384), _activation),
    Case("adamw", f"{_L8}, 8 matrices", _LIST, (8, 4096, 4096), (8, 512, 1024), (8, 64, 1024), _adamw),
    Case("add_rms_norm", _L8, _TH, (4096, 4096), (512, 4096), (128, 4096), _ADD),
    Case("add_rms_norm", _Q72, _TH, (4096, 8192), (256, 8192), (64, 8192), _norm("x", "residual")),
    Case("attention", _L8, _QKV, (4096, 32, 8, 128, 128), (512, 8, 2, 128, 128), (256, 4, 1, 128, 128),
         _attention("bhsd")),
    Case("attention", _Q72, _QKV, (4096, 64, 8, 128, 128), (512, 8, 1, 128, 128), (256, 4, 1, 128, 128),
         _attention("sbhd")),
    Case("attention", _DS, _QKV, (4096, 128, 128, 192, 128), (512, 8, 8, 192, 128), (128, 4, 4, 192, 128),
         _attention("bhsd")),
    Case("clip_grads", f"{_L8}, 8 matrices", _LIST, (8, 4096, 4096), (8, 512, 1024), (8, 64, 1024),
         _one_list("grads")),
    Case("cross_entropy", _L8, _TV, (4096, 128256), (64, 128256), (16, 128256), _logits),
    Case("cross_entropy", _MX, _TV, (4096, 32000), (256, 32000), (64, 32000), _logits),
    Case("decode_attention", _L8, ("batch", "cache", "heads", "key heads", "head size"), (8, 4096, 32, 8, 128),
         (2, 1024, 32, 8, 128), (1, 512, 32, 8, 128), _decode),
    Case("dequantize_fp8", _DS, _RC, (4096, 7168), (512, 7168), (128, 7168), _fp8),
    Case("dequantize_int8", _L8, _RC, (4096, 4096), (512, 4096), (128, 4096), _int8),
    Case("dropout_add", _GPT, _TH, (4096, 4096), (512, 4096), (128, 4096), _dropout),
    Case("fp8_scale_update", _DS, ("steps", "tensors"), (1024, 512), (1024, 512), (1024, 512), _history),
    Case("fused_linear_cross_entropy", _L8, ("tokens", "hidden", "vocabulary"), (4096, 4096, 128256),
         (256, 512, 32064), (64, 512, 8016), _head_and_loss),
    Case("glu", _L8, _TW, (4096, 14336), (256, 14336), (32, 14336), _gate_and_up),
    Case("glu", _Q72, _TW, (4096, 29568), (128, 29568), (16, 29568), _packed),
    Case("glu", _DS, ("rows", "width"), (32768, 2048), (1024, 2048), (128, 2048), _routed),
    Case("grouped_gemm", _MX, ("rows", "experts", "inputs", "outputs"), (8192, 8, 4096, 14336),
         (512, 8, 512, 1792), (128, 8, 512, 448), _grouped),
    Case("grouped_gemm", _DS, ("rows", "experts", "inputs", "outputs"), (32768, 32, 7168, 2048),
         (512, 16, 896, 256), (128, 8, 448, 256), _grouped),
    Case("layer_norm", _GPT, _TH, (4096, 4096), (512, 4096), (128, 4096), _layer_norm),
    Case("linear_fp8", _DS, _TIO, (4096, 7168, 2048), (128, 1024, 1024), (64, 512, 512), _linear),
    Case("linear_int8", _L8, _TIO, (4096, 4096, 4096), (128, 1024, 1024), (64, 512, 512), _linear_int8),
    Case("moe_permute", _MX, _MOE, (4096, 4096, 8, 2), (256, 4096, 8, 2), (64, 4096, 8, 2), _permute),
    Case("moe_permute", _DS, _MOE, (4096, 7168, 256, 8), (64, 7168, 256, 8), (16, 7168, 256, 8), _permute),
    Case("moe_unpermute", _MX, _MOE, (4096, 4096, 8, 2), (256, 4096, 8, 2), (64, 4096, 8, 2), _unpermute),
    Case("moe_unpermute", _DS, _MOE, (4096, 7168, 256, 8), (64, 7168, 256, 8), (16, 7168, 256, 8), _unpermute),
    Case("multi_tensor_l2norm", f"{_L8}, 8 matrices", _LIST, (8, 4096, 4096), (8, 512, 1024), (8, 64, 1024),
         _one_list("tensors")),
    Case("multi_tensor_scale", f"{_L8}, 8 matrices", _LIST, (8, 4096, 4096), (8, 512, 1024), (8, 64, 1024), _scale),
    Case("quantize_fp8", _DS, _RC, (4096, 7168), (256, 7168), (64, 7168), _blocks),
    Case("quantize_int8", _L8, _RC, (4096, 4096), (512, 4096), (128, 4096), _rows),
    Case("rms_norm", _L8, _TH, (4096, 4096), (512, 4096), (128, 4096), _norm("x", form="cast_first")),
    Case("rms_norm", _Q72, _TH, (4096, 8192), (256, 8192), (64, 8192), _norm("x")),
    Case("rms_norm", "Qwen3-8B, its heads", _HS, (131072, 128), (8192, 128), (2048, 128),
         _norm("x", form="cast_first")),
    Case("rope", _L8, _THS, (4096, 32, 128), (512, 32, 128), (128, 32, 128), _rope("bhsd")),
    Case("rope", _Q72, _THS, (4096, 64, 128), (256, 64, 128), (64, 64, 128), _rope("sbhd")),
    Case("rope", _DS, _THS, (4096, 128, 64), (256, 128, 64), (64, 128, 64),
         _rope("bhsd", pairs="interleaved_to_half")),
    Case("router_aux_loss", _DS, _TE, (4096, 256), (4096, 256), (4096, 256), _aux_loss),
    Case("router_z_loss", _DS, _TE, (4096, 256), (4096, 256), (4096, 256), _z_loss),
    Case("scaled_masked_softmax", _GPT, ("heads", "queries"), (32, 2048), (4, 1024), (4, 256), _scores),
    Case("softmax_partials", f"{_L8} on 8 ranks", _TV, (4096, 16032), (256, 16032), (64, 16032), _logits),
    Case("topk_router", _MX, _TE, (4096, 8), (4096, 8), (4096, 8), _MIXTRAL_ROUTER),
    Case("topk_router", _DS, _TE, (4096, 256), (1024, 256), (256, 256), _DEEPSEEK_ROUTER),
    Case("wgrad_accumulate", _L8, _TIO, (4096, 4096, 14336), (512, 1024, 1024), (128, 512, 512), _wgrad),
)  # fmt: skip
SWEEP_MODEL = "length "
# Time and memory against the length of a sequence: linear, or quadratic where all scores are kept.
SWEEP = tuple(
    Case("attention", f"{SWEEP_MODEL}{length}", _QKV, *(3 * ((length, 4, 4, 64, 64),)), _attention("bhsd"))
    for length in (256, 512, 1024, 2048, 4096)
)


def cases_of(op: FusedOp, is_quick: bool = False) -> Iterator[Case]:
    """The cases of an op; those of an op that is not listed here are its own example at its own sizes."""
    listed = [case for case in CASES if case.op == op.name]
    yield from listed[:1] if is_quick else listed
    if not listed and op.example is not None:
        for label, shape in list(op.sizes.items())[: 1 if is_quick else None]:
            yield _of_example(op, label, shape)


def _of_example(op: FusedOp, label: str, shape: tuple[int, ...]) -> Case:
    example = op.example
    assert example is not None

    def make(g: torch.Generator, dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
        return example(g, dtype, sizes)

    axes = tuple(f"axis {index}" for index in range(len(shape)))
    narrowed: Mapping[str, tuple[int, ...]] = {scale: _narrowed(shape, most) for scale, most in _SMALL.items()}
    return Case(op.name, label, axes, shape, narrowed["cpu"], narrowed["quick"], make)


def _narrowed(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The shape with fewer elements: halved along the first axes; the last one makes the kernel and stays."""
    small = list(shape)
    for axis in range(len(small) - 1):
        while small[axis] > 1 and torch.Size(small).numel() > most:
            small[axis] //= 2
    return tuple(small)


def without_case() -> list[str]:
    """Ops that nothing here can call: a test says that there is none of ours."""
    return [op.name for op in all_ops().values() if not any(True for _ in cases_of(op))]
