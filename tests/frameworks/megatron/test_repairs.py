"""Repairs of single Megatron functions: what each changes, and what it leaves as it was."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.errors import PatchError
from llm_adapt.frameworks.megatron import repairs
from llm_adapt.report import Report

TRACKER_LOG = "megatron.core.tensor_parallel.random"


def raising(error: Exception) -> Callable[[], bool]:
    """A version check that raises."""

    def check() -> bool:
        raise error

    return check


@pytest.mark.parametrize(
    "error",
    [
        TypeError("'>=' not supported between instances of 'NoneType' and 'Version'"),
        ImportError("No module named 'flash_attn'"),
        PackageNotFoundError("flash-attn"),
    ],
)
def test_a_package_that_is_not_there_is_older(error: Exception) -> None:
    """Every way in which Megatron's check fails for an absent package becomes the answer no."""
    assert repairs.absent_is_older(raising(error))() is False


@pytest.mark.parametrize("answer", [True, False])
def test_a_package_that_is_there_answers_for_itself(answer: bool) -> None:
    """With the package installed the original decides, with the caller's arguments."""
    seen: list[Any] = []

    def check(version: str, check_equality: bool = True) -> bool:
        seen.append((version, check_equality))
        return answer

    assert repairs.absent_is_older(check)("1.3", check_equality=False) is answer
    assert seen == [("1.3", False)]


@pytest.mark.parametrize("error", [TypeError("expected string or bytes-like object"), ValueError("bad version")])
def test_another_error_of_a_version_check_stays_an_error(error: Exception) -> None:
    """A mistake of the caller is not swallowed."""
    with pytest.raises(type(error), match=str(error)):
        repairs.absent_is_older(raising(error))()


def test_the_fuser_leaves_functions_alone() -> None:
    """`@jit_fuser` and `@jit_fuser(dynamic=True)` give back the very function."""

    def function() -> int:
        return 1

    assert repairs.no_fuser(function) is function
    assert repairs.no_fuser(dynamic=True)(function) is function


def test_there_is_no_fused_softmax() -> None:
    """`is_kernel_available` says no for every mask and size."""
    assert repairs.never(object(), None, 4, 4, 128, 128) is False


@contextmanager
def noisy_fork(name: str = "default") -> Iterator[str]:
    """Stands for `CudaRNGStatesTracker.fork`."""
    logging.getLogger(TRACKER_LOG).warning("CPU RNG state changed within GPU RNG context")
    logging.getLogger(TRACKER_LOG).warning("another warning about %s", name)
    yield name


def test_only_the_warning_about_the_shared_generator_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Inside a fork that one warning is silent, others are not; after the fork, also a failed one, none is."""
    with caplog.at_level(logging.WARNING), pytest.raises(KeyError, match="inside"):
        with repairs.quiet_fork(noisy_fork)("expert"):
            raise KeyError("inside")
    assert [record.getMessage() for record in caplog.records] == ["another warning about expert"]
    with noisy_fork():
        pass
    assert "CPU RNG state changed" in caplog.text
    assert logging.getLogger(TRACKER_LOG).filters == []


def helpers(folder: Path, body: str = "return 42;", **variables: str) -> Callable[[], None]:
    """A folder with the contract of Megatron's: a Makefile that reads LIBEXT and CPPFLAGS, and a source file."""
    assert set(variables) <= {"CXX"}
    (folder / "helpers.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        f"int answer() {{ {body} }}\n"
        'PYBIND11_MODULE(helpers_cpp, module) { module.def("answer", &answer); }\n'
    )
    compiler = variables.get("CXX", "c++")
    (folder / "Makefile").write_text(
        "LIBEXT = .from-another-python\nCPPFLAGS = -I/nowhere\n"
        f"default: helpers_cpp$(LIBEXT)\nhelpers_cpp$(LIBEXT): helpers.cpp\n"
        f"\t{compiler} -O0 -shared -std=c++17 -fPIC $(CPPFLAGS) $< -o $@\n"
    )
    (folder / "utils.py").write_text("def compile_helpers():\n    raise AssertionError('the original was called')\n")
    scope: dict[str, Any] = {}
    exec(compile((folder / "utils.py").read_text(), str(folder / "utils.py"), "exec"), scope)
    return repairs.compile_helpers(scope["compile_helpers"])


needs_compiler = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("c++") is None or importlib.util.find_spec("pybind11") is None,
    reason="make, a C++ compiler or pybind11 is not installed",
)


@needs_compiler
def test_helpers_are_built_for_the_interpreter_that_runs(tmp_path: Path) -> None:
    """The extension has this interpreter's suffix, imports in it, and is not built a second time."""
    build = helpers(tmp_path)
    build()
    built = tmp_path / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    code = "import helpers_cpp; print(helpers_cpp.answer())"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "42\n"
    before = built.stat().st_mtime_ns
    (tmp_path / "helpers.cpp").write_text("broken")
    build()
    assert built.stat().st_mtime_ns == before


@needs_compiler
def test_a_failing_compilation_shows_what_the_compiler_said(tmp_path: Path) -> None:
    """The error has the command and the compiler's own lines, and leaves no extension behind."""
    with pytest.raises(PatchError, match=r"(?s)'make -C .*LIBEXT=.*failed:.*undeclared_name") as caught:
        helpers(tmp_path, body="return undeclared_name;")()
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.glob("helpers_cpp*"))


@needs_compiler
def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    """make's complaint about a compiler that is not there reaches the user."""
    with pytest.raises(PatchError, match="no-such-compiler"):
        helpers(tmp_path, CXX="no-such-compiler")()


@needs_compiler
def test_without_make_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty PATH has no make."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PatchError, match=r"make is missing\. Install make and g\+\+"):
        helpers(tmp_path)()


def test_without_pybind11_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled without pybind11's headers."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PatchError, match="pip install pybind11"):
        helpers(tmp_path)()


@pytest.mark.parametrize(("local_rank", "expected"), [(None, "xpu"), (3, "xpu:3")])
def test_a_backend_that_megatron_does_not_know_is_this_device(
    monkeypatch: pytest.MonkeyPatch, local_rank: int | None, expected: str
) -> None:
    """For hccl and the like the signal handler gathers on this device, where the original raises."""
    adapter = dataclasses.replace(ADAPTER, device_type="xpu")
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "xccl")
    get_device = repairs.signal_device(adapter)(raising(RuntimeError("unknown backend")))
    assert get_device(local_rank) == torch.device(expected)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_backend_that_megatron_knows_is_left_to_it(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """For nccl and gloo the original answers."""
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    assert repairs.signal_device(ADAPTER)(lambda local_rank=None: ("original", local_rank))(5) == ("original", 5)


ROPE_UTILS = "megatron.core.models.common.embeddings.rope_utils"


@pytest.fixture
def rope_kernels(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands for Megatron's module, with neither of TransformerEngine's kernels."""
    rope_utils = types.ModuleType(ROPE_UTILS)
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = None
    parent = types.ModuleType(ROPE_UTILS.rpartition(".")[0])
    parent.rope_utils = rope_utils
    names = ROPE_UTILS.split(".")
    for depth in range(1, len(names) - 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:depth]), types.ModuleType(".".join(names[:depth])))
    monkeypatch.setitem(sys.modules, parent.__name__, parent)
    monkeypatch.setitem(sys.modules, ROPE_UTILS, rope_utils)
    return rope_utils


def checked(report: Report, **values: Any) -> types.SimpleNamespace:
    """A config after `__post_init__`; `seen` is what the original found."""
    config = types.SimpleNamespace(**values)

    def post_init(self: Any) -> None:
        self.seen = getattr(self, "apply_rope_fusion", None)

    repairs.unfused_rope(report)(post_init)(config)
    return config


def test_rope_fusion_without_its_kernel_is_off_and_reported(rope_kernels: types.ModuleType) -> None:
    """The original finds the fusion off, and the report says why and what computes instead."""
    report = Report()
    config = checked(report, apply_rope_fusion=True, multi_latent_attention=False)
    assert config.seen is False
    (line,) = report.lines
    assert (line.subject, line.choice) == ("apply_rope_fusion", "off")
    assert line.reason == "TransformerEngine is not installed; Megatron's unfused rope computes the same"


def test_rope_fusion_with_its_kernel_stays_on(rope_kernels: types.ModuleType) -> None:
    """A working kernel is used."""
    rope_kernels.fused_apply_rotary_pos_emb = lambda t, freqs: t
    report = Report()
    assert checked(report, apply_rope_fusion=True, multi_latent_attention=False).seen is True
    assert report.lines == []


@pytest.mark.parametrize("values", [{"apply_rope_fusion": False}, {}])
def test_a_config_that_asks_for_no_fusion_is_not_touched(values: dict[str, bool]) -> None:
    """Off stays off, and a version without the field gets none; neither is reported."""
    report = Report()
    config = checked(report, **values)
    assert config.seen is (False if values else None)
    assert hasattr(config, "apply_rope_fusion") == bool(values)
    assert report.lines == []


@pytest.mark.parametrize("has_triton", [True, False])
def test_multi_latent_attention_needs_triton(monkeypatch: pytest.MonkeyPatch, has_triton: bool) -> None:
    """Its fused rope is a Triton kernel: on with Triton, off and reported without."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_triton else None)
    report = Report()
    assert checked(report, apply_rope_fusion=True, multi_latent_attention=True).seen is has_triton
    assert [line.reason.partition(";")[0] for line in report.lines] == (
        [] if has_triton else ["triton is not installed"]
    )


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def validated(report: Report, **flags: bool) -> str | None:
    """What Megatron's argument check sees of the variable."""
    validate = repairs.connections_for_fsdp(report)(lambda args, defaults: os.environ.get(CONNECTIONS))
    return validate(types.SimpleNamespace(**flags), {})  # type: ignore[no-any-return]


@pytest.mark.parametrize("flag", ["use_megatron_fsdp", "use_torch_fsdp2"])
def test_fsdp_does_not_see_the_default_of_the_adapter(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """The variable is hidden while arguments are checked, is back afterwards, and the report says so."""
    monkeypatch.setenv(CONNECTIONS, "1")
    report = Report()
    assert validated(report, **{flag: True}) is None
    assert os.environ[CONNECTIONS] == "1"
    assert [line.subject for line in report.lines] == [f"{CONNECTIONS}=1"]


@pytest.mark.parametrize(
    ("value", "flags"), [("1", {}), ("1", {"use_megatron_fsdp": False}), ("8", {"use_megatron_fsdp": True})]
)
def test_the_variable_is_seen_in_every_other_case(
    monkeypatch: pytest.MonkeyPatch, value: str, flags: dict[str, bool]
) -> None:
    """Without FSDP, or with another value, the check sees what is set."""
    monkeypatch.setenv(CONNECTIONS, value)
    report = Report()
    assert validated(report, **flags) == value
    assert report.lines == []


def test_the_variable_comes_back_after_a_refused_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that raises leaves the environment as it was."""
    monkeypatch.setenv(CONNECTIONS, "1")
    wrapped = repairs.connections_for_fsdp(Report())(lambda args: raising(AssertionError("refused"))())
    with pytest.raises(AssertionError, match="refused"):
        wrapped(types.SimpleNamespace(use_megatron_fsdp=True))
    assert os.environ[CONNECTIONS] == "1"
