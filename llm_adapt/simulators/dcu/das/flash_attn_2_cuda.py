"""flash_attn_2_cuda of DTK: the compiled part. That it is there is public; none of its functions are."""

from llm_adapt.simulators.dcu.das.limits import missing

__getattr__ = missing("flash_attn_2_cuda")
