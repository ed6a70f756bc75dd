"""Hygon DCU: torch's cuda device on host memory, with the identity of a DTK build.

The real torch.cuda (its Python module) runs over functions that we give torch._C, operators by torch's CPU kernels,
collectives by gloo under the name nccl. Nothing here comes from DTK; what is known of it is in docs/devices.md.
"""

from llm_adapt.simulators.base import Simulator
from llm_adapt.simulators.dcu.chips import CHIPS
from llm_adapt.simulators.dcu.simulation import enter, install, libraries

__all__ = ["SIMULATOR"]

_UNKNOWN = (
    "DTK's flash_attn: its source and licence, which dtype and head size works on which gfx; its functions other than "
    "flash_attn_func and flash_attn_varlen_func, and gradients of s_aux: they raise",
    "bfloat16 on gfx906, gfx926, gfx928 and gfx92a: raises",
    "get_device_name of chips other than gfx936 and gfx938: raises; get_device_capability follows HIP's convention, "
    "(9, 3) for gfx936",
    "sizes of a card (memory, compute units, caches, clocks): memory is a limit of the simulator, the rest raises",
    "lightop other than rmsnorm_forward and rmsnorm_backward: raises",
    "compatibility of hyhal, driver and DTK beyond 4.2: not modelled",
    "RCCL: its version (0.0.0 here), float8 and PREMUL_SUM: both raise",
    "TransformerEngine and xformers of DTK: their coverage; not served",
    "which reductions and SDPA shapes DTK refuses beyond attention without a mask when flash_attn is missing",
    "multi-node results, NUMA maps, contents of the vendor's images",
    "gcnArchName on old builds (torch 1.13 of DTK 23)",
)

SIMULATOR = Simulator(
    name="dcu",
    title="Hygon DCU: torch.cuda on host memory as a DTK build presents it",
    models={model: f"{chip.gfx}{f', named {chip.name!r}' if chip.name else ''}" for model, chip in CHIPS.items()},
    default_model="BW1000",
    libraries=libraries,
    enter=enter,
    install=install,
    unknown=_UNKNOWN,
)
