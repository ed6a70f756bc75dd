"""A torch_npu that breaks `import torch` as the real one does without CANN, for tests in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.adapters.fake_host import FakeHost

ROOT = Path(__file__).resolve().parents[2]
ERROR = "libascendcl.so: cannot open shared object file: No such file or directory"


def install(folder: Path, text: str = f"raise ImportError({ERROR!r})") -> Path:
    """Install the plug-in with its autoload entry point; return the folder for PYTHONPATH."""
    entry_points = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    fake = FakeHost(folder).package("torch_npu", "2.13.0", text)
    return fake.dist("torch_npu", "2.13.0", entry_points=entry_points).site


def python(code: str, *paths: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a child process whose Python path starts with these folders."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_ADAPT_", "TORCH_DEVICE_"))}
    kept["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run([sys.executable, "-c", code], env=kept | environ, capture_output=True, text=True, timeout=240)
