"""apex.normalization."""

from apex.normalization.fused_layer_norm import FusedLayerNorm

from llm_adapt.simulators.dcu.das.limits import missing

__all__ = ["FusedLayerNorm"]

__getattr__ = missing("apex.normalization")
