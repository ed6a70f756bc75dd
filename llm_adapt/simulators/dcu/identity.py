"""How torch names itself on DTK: a ROCm-shaped build with "das" in its version."""

from __future__ import annotations

from types import ModuleType

__all__ = ["HIP_VERSION", "LOCAL_VERSION", "present"]

# Recorded with torch 2.9.0+das.opt1.dtk2604. No DAS build of the torch that is installed here is known, so that its
# version says "simulated" where that of a real one has DTK's number.
HIP_VERSION = "6.3.26093"
LOCAL_VERSION = "das.simulated"


def present(version: ModuleType) -> None:
    """Change torch.version before torch reads it: 2.13.0+cpu -> 2.13.0+das.simulated, hip set, cuda None."""
    public = str(version.__version__).partition("+")[0]
    version.__version__ = f"{public}+{LOCAL_VERSION}"  # type: ignore[attr-defined]
    version.hip = HIP_VERSION  # type: ignore[attr-defined]
    version.cuda = None  # type: ignore[attr-defined]
