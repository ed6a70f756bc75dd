"""Attention by the two public functions of flash-attn, which many vendors ship under its name.

flash_attn_func takes [B, S, H, D] and flash_attn_varlen_func [T, H, D] with cumulative lengths; causal and windows
are aligned at the bottom right; a row without keys is 0. What a build takes is read from its signatures, not from a
version: builds of other vendors name versions that they are not.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llm_adapt.ops.attention_parts.host_lists import host_list
from llm_adapt.ops.attention_parts.lse_gradient import with_gradient
from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call

__all__ = ["Flash"]

_LENGTH = {"bshd": 1, "sbhd": 0, "bhsd": 2, "thd": 0}
_TURN = {"sbhd": (0, 1), "bhsd": (1, 2)}  # the axes that stand otherwise in bshd
_NAMES = {"softcap": "softcap", "alibi_slopes": "alibi_slopes", "dropout_p": "dropout_p"}


@dataclass(frozen=True)
class Flash:
    """The functions of one build.

    Attributes:
        dense, packed: flash_attn_func and flash_attn_varlen_func.
        largest: largest head size.
    """

    dense: Callable[..., Any]
    packed: Callable[..., Any]
    largest: int = 256

    def takes(self, name: str) -> bool:
        """Whether both functions have a parameter of that name."""
        return all(name in inspect.signature(function).parameters for function in (self.dense, self.packed))

    def refuses(self, call: Call) -> str | None:
        """Why this build does not serve a call."""
        if call.q.dtype not in (torch.float16, torch.bfloat16):
            return "takes float16 and bfloat16"
        if any(0 in call.tensors[name].shape for name in "qkv"):
            return "takes no empty tensors"
        if call.q.shape[-1] > self.largest or call.v.shape[-1] > call.q.shape[-1]:
            return f"takes head sizes up to {self.largest}, and values no wider than keys"
        length = _LENGTH[call.layout]
        if call.causal == "top_left" and (call.layout == "thd" or call.q.shape[length] != call.k.shape[length]):
            return "aligns causal attention at the bottom right"
        for name, theirs in _NAMES.items():
            if name in call.given and not self.takes(theirs):
                return f"this build has no {theirs}"
        if call.alibi_slopes and call.alibi_slopes.dtype != torch.float32:
            return "takes slopes of float32"
        if call.dropout_p and "seed" not in call.given:
            return "drops nothing without a seed"  # and the reference says so
        if call.dropout_p and call.device != "cuda":
            return "takes a seed for its dropout on cuda alone"
        if (call.deterministic or call.is_deterministic) and not self.takes("deterministic"):
            return "this build has no deterministic backward"
        if call.return_lse and not self.takes("return_attn_probs"):
            return "this build gives no log-sum-exp"
        return None

    def __call__(self, given: dict[str, Any]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The op with these arguments, by name."""
        q, k, v, layout = (given[name] for name in ("q", "k", "v", "layout"))
        value_size = v.shape[-1]
        if layout in _TURN:
            q, k, v = (x.transpose(*_TURN[layout]) for x in (q, k, v))
        if v.shape[-1] < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        ends_q, ends_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
        if ends_q is not None:
            q, k, v = _zeros_behind(q, ends_q), _zeros_behind(k, ends_k), _zeros_behind(v, ends_k)
        attend = self._attend(given, q.shape[-1])
        with _seeded(given["seed"], q.device) if given["dropout_p"] else contextlib.nullcontext():
            found = attend(q, k, v, given["return_lse"])
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        if ends_q is not None:
            out = torch.where(_inside(q, ends_q), out, 0)
        out = out[..., :value_size]
        out = (out.transpose(*_TURN[layout]) if layout in _TURN else out).contiguous()
        if not given["return_lse"]:
            return out
        lse = found[1].masked_fill(found[1] == torch.inf, -torch.inf)  # of a row without keys it is +inf there
        if ends_q is not None:
            lse = lse.masked_fill(~_inside(q, ends_q)[:, 0, 0], -torch.inf)
        scale = q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]

        def output(q: torch.Tensor, k: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            again = attend(q, k, values, False)
            return again if ends_q is None else torch.where(_inside(q, ends_q), again, 0)

        return out, with_gradient(lse, q, k, scale, output, lambda g: g.transpose(-1, -2).unsqueeze(-1))

    def _attend(self, given: dict[str, Any], size: int) -> Callable[..., Any]:
        """(q, k, v, with log-sum-exp) -> what the build returns, for the options of a call."""
        right = given["window_right"]
        options: dict[str, Any] = {
            "softmax_scale": size**-0.5 if given["scale"] is None else given["scale"],
            "causal": given["causal"] != "none",
            "window_size": (given["window_left"], 0 if given["causal"] != "none" else right),
        }
        if given["window_left"] < 0 and options["causal"]:
            options["window_size"] = (-1, -1)
        for name, theirs in _NAMES.items():
            if isinstance(given[name], torch.Tensor) or given[name]:
                options[theirs] = given[name]
        if given["deterministic"] or torch.are_deterministic_algorithms_enabled():
            options["deterministic"] = True
        function = self.dense
        if given["cu_seqlens_q"] is not None:
            function = self.packed
            for side in ("q", "k"):
                ends = given[f"cu_seqlens_{side}"]
                options[f"cu_seqlens_{side}"] = ends.to(torch.int32)
                options[f"max_seqlen_{side}"] = given[f"max_seqlen_{side}"] or _longest(ends)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, with_lse: bool) -> Any:
            return function(q, k, v, **options, **({"return_attn_probs": True} if with_lse else {}))

        return attend


def _longest(ends: torch.Tensor) -> int:
    """The longest sequence, for callers that do not say it: waits for the device."""
    values = host_list(ends)
    return max(end - start for start, end in itertools.pairwise(values))


def _inside(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Which tokens [T, 1, 1] belong to a sequence; the others are padding behind the last."""
    return (torch.arange(x.shape[0], device=x.device) < ends[-1])[:, None, None]


class _ZerosBehind(Function):
    """x; its gradient is 0 for padding, of which the packed function leaves the gradient unset."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inside)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return torch.where(inside, g, 0), None


def _zeros_behind(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _ZerosBehind.apply(x, _inside(x, ends))  # type: ignore[no-untyped-call]
    return found


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Any:
    """The device's generator stands at the seed inside, and where it was after: the build draws from it."""
    with torch.random.fork_rng(devices=[device], device_type=device.type):
        torch.get_device_module(device).manual_seed(seed)
        yield
