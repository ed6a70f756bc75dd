"""Dispatch: which kernel serves an op, proved before it serves. (In the folder above, each file is an op.)"""

from llm_adapt.ops.dispatch.call import Call, TensorFacts
from llm_adapt.ops.dispatch.dispatcher import fused_op
from llm_adapt.ops.dispatch.registry import HEAD_SIZES, HIDDEN_SIZES, kernel
from llm_adapt.ops.dispatch.tolerances import Tolerance

__all__ = ["HEAD_SIZES", "HIDDEN_SIZES", "Call", "TensorFacts", "Tolerance", "fused_op", "kernel"]
