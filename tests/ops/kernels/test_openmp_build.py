"""Building the OpenMP kernels: once for all processes, under a name that says for what, and a reason where it fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_adapt.ops.dispatch.registry import load_library
from llm_adapt.ops.kernels.openmp import build

ROOT = Path(__file__).parents[3]
LOAD = "from llm_adapt.ops.dispatch.registry import load_library; print(load_library('openmp'))"

needs_library = pytest.mark.skipif(bool(load_library("openmp")), reason=load_library("openmp"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LLM_ADAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one source that compiles at once, in place of ours."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "_HERE", folder)
    return folder


def test_it_is_built_once(cache: Path, small_sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first load builds and says so; the next takes what is there, and nothing else is left in the cache."""
    with caplog.at_level(logging.INFO, "llm_adapt"):
        path = build.built_library()
        before = path.stat().st_mtime_ns
        assert build.built_library() == path
    assert path.stat().st_mtime_ns == before
    assert caplog.records[0].message.partition(":")[0] == "building the openmp kernels"
    assert len(caplog.records) == 2
    assert {item.suffix for item in cache.iterdir()} == {".so", ".lock"}


def test_a_changed_source_is_another_library(cache: Path, small_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources, headers, CPU and flags are in the name: none is taken for another."""
    names = [build.built_library().name]
    (small_sources / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    names.append(build.built_library().name)
    (small_sources / "one.h").write_text("\n")
    names.append(build.built_library().name)
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    names.append(build.built_library().name)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DOTHER"))
    names.append(build.built_library().name)
    assert len(set(names)) == 5


def test_a_broken_source_is_a_reason(cache: Path, small_sources: Path) -> None:
    """One line with what the compiler said, the rest of it in a file, and no library."""
    (small_sources / "one.cpp").write_text("int one( { return 1; }\n")
    with pytest.raises(ImportError, match=r"g\+\+ refused the openmp kernels: .*error: .*failure\.txt") as raised:
        build.built_library()
    assert "\n" not in str(raised.value)
    assert "one.cpp" in next(cache.glob("*.failure.txt")).read_text()
    assert list(cache.glob("*.so")) == []


def test_a_read_only_cache_is_a_reason(tmp_path: Path, small_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be written says so and names the way out; what is built in it already is used."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_ADAPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ImportError, match=r"name a folder that can be written with LLM_ADAPT_CACHE"):
        build.built_library()
    monkeypatch.setenv("LLM_ADAPT_CACHE", str(tmp_path / "cache"))
    path = build.built_library()
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    (path.with_suffix(".lock")).unlink()
    path.parent.chmod(0o500)
    assert build.built_library() == path


def test_without_a_compiler_there_is_a_reason(tmp_path: Path) -> None:
    """No g++ on PATH: the library cannot be loaded, every report can say why, and nothing else fails."""
    environ = os.environ | {"PATH": str(tmp_path), "LLM_ADAPT_CACHE": str(tmp_path)}
    code = f"{LOAD}; from llm_adapt.ops.rms_norm import rms_norm; import torch; print(rms_norm(torch.ones(2, 4)).shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ImportError: the openmp kernels are compiled at their first use and there is no g++")
    assert lines[1] == "torch.Size([2, 4])"


ALONE = """
import importlib.util, logging, pathlib, sys
logging.basicConfig(level="INFO")
spec = importlib.util.spec_from_file_location("build", sys.argv[1])  # without torch, which takes seconds to import
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build._HERE = pathlib.Path(sys.argv[2])
print(build.built_library())
"""


def test_two_processes_build_once(cache: Path, small_sources: Path) -> None:
    """Ranks that start together: one builds, the others wait for it, and all get the same library."""
    command = [sys.executable, "-c", ALONE, build.__file__, str(small_sources)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in started]
    (library,) = cache.glob("*.so")
    assert [out.strip() for out, _ in said] == [str(library)] * 3
    assert sum("built the openmp kernels" in errors for _, errors in said) == 1


@needs_library
def test_threads_are_those_of_torch() -> None:
    """It uses the OpenMP that torch has loaded, so torch.set_num_threads holds for it; there is no second one."""
    from llm_adapt.ops.kernels.openmp.library import function

    threads = function("threads", "", int)
    before = torch.get_num_threads()
    found = []
    for number in (1, 2, before):
        torch.set_num_threads(number)
        found.append(threads())
    assert found == [1, 2, before]
    maps = Path("/proc/self/maps")
    if maps.exists():
        runtimes = {
            line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libiomp" in line
        }
        assert len(runtimes) == 1
