"""The losses of transformers reach `cross_entropy`.

`fixed_cross_entropy` is what all losses over classes call. Those of causal and masked language models cast the logits
to float32 before: a copy of twice the size of 16-bit logits, kept for backward. The op computes in float32 by itself,
so they hand the logits over as they are; loss and gradient are the same numbers.

What the op does not take goes to the code of transformers, with a line in the report: classes on another axis (images),
targets that are probabilities or no int64, tensors of other types (DTensor), 16 bits under autocast. All of this is
told by type, dtype and shape, so torch.compile traces it.

Source: loss/loss_utils.py of transformers 5.23 and 5.24.
"""

from __future__ import annotations

from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import VERSIONS
from llm_adapt.patching import Patch, PlanItem

__all__ = ["rows"]

_MODULE = "transformers.loss.loss_utils"
# Name -> fingerprint, and the reason. The replacements rely on these bodies: another body is left alone.
_FUNCTIONS = {
    "fixed_cross_entropy": ("beafce25a7bd", "one kernel for the loss"),
    "ForCausalLMLoss": ("75a70a705201", "16-bit logits are not copied to float32"),
    "ForMaskedLMLoss": ("820f17319130", "16-bit logits are not copied to float32"),
}


def rows(context: Context) -> list[PlanItem]:
    """Three functions; the tables of transformers that hold them follow."""
    ours: dict[str, Any] = {}  # filled as the functions are made, for them to know of one another

    def wrap(name: str) -> Any:
        def make(original: Any) -> Any:
            from llm_adapt.frameworks.transformers import loss_functions
            from llm_adapt.frameworks.transformers.activations import reporter

            ours[name] = getattr(loss_functions, name)(original, reporter(context.report), ours)
            return ours[name]

        return make

    return [
        Patch(
            f"{_MODULE}:{name}", wrap(name), reason, kind="wrap", optional=True, versions=VERSIONS,
            fingerprints={"5.23 and 5.24": body},
        )
        for name, (body, reason) in _FUNCTIONS.items()
    ]  # fmt: skip
