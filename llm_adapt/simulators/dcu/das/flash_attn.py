"""flash_attn of DTK: the wheel is 2.8.3+das.opt1.dtk2604, and this says 2.6.1, as the real one does.

Source: records of that wheel on BW; its flash_attn_interface.py. It imports pytest, which must be installed.
"""

import importlib.util

if importlib.util.find_spec("pytest") is None:
    raise ModuleNotFoundError("No module named 'pytest' (DTK's flash_attn imports it)", name="pytest")

from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_varlen_with_mask_func,
    flash_attn_with_mask_func,
    vllm_flash_attn_varlen_func,
)

from llm_adapt.simulators.dcu.das.limits import missing

__version__ = "2.6.1"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_with_mask_func",
    "flash_attn_with_mask_func",
    "vllm_flash_attn_varlen_func",
]

__getattr__ = missing("flash_attn")
