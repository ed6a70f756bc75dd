"""apex of DTK, 1.7.0+das.opt2.dtk2604: the parts that its README names and that training calls.

Source: HYGON-AI/apex-das README at 5051199 (a fork of ROCm/apex release/1.7.0; FusedAdam, LayerNorm, AMP); the
arguments are those of NVIDIA apex. Its MLP and FusedDense are left out.
"""

from llm_adapt.simulators.dcu.das.limits import missing

__getattr__ = missing("apex")
