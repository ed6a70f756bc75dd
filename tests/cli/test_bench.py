"""llm-adapt bench: what is proved is timed, what is not is listed, and who is slower than eager is found."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.cli.bench import counterparts, eager
from llm_adapt.cli.main import main
from llm_adapt.ops.dispatch import registry
from llm_adapt.ops.dispatch.registry import Kernel, all_ops

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
SHORT = ("bench", "--quick", "--device", "cpu", "--seconds", "0.01", "--dtype", "fp32")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench(out: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """Run the benchmark into a folder, assert its exit code, and read its JSON."""
    assert main([*SHORT, "--out", str(out), *words]) == code
    found: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return found


def rows_of(record: dict[str, Any], candidate: str) -> list[dict[str, Any]]:
    """The rows of one candidate."""
    return [row for row in record["results"] if row["candidate"] == candidate]


def put_in(patch: Patch, library: str, function: Any) -> None:
    """Add a kernel of glu to a library that has just been imported."""
    patch.setitem(registry._LIBRARIES, library, "")
    patch.setitem(all_ops()["glu"].kernels, library, Kernel("glu", library, function, "this test"))


def right(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU as it should be."""
    assert up is not None
    return torch.nn.functional.silu(x) * up


def wrong(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU with a term too many."""
    return right(x, up) + 0.01


def slow(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU after a nap."""
    time.sleep(0.1)
    return right(x, up)


def test_what_is_written(tmp_path: Path, capsys: Capture) -> None:
    """JSON has the device, versions, threads and command, and for each candidate figures or a refusal."""
    record = bench(tmp_path / "new" / "folder", "--only", "glu", "--peers", "none")
    assert (record["schema"], record["benchmark"], record["confidence"]) == (1, "ops", 0.95)
    assert record["command"].startswith("llm-adapt bench --quick --only glu --device cpu")
    facts = record["facts"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["copy_bandwidth_gb_s"] > 0
    assert facts["matmul_gflop_s"]["float32"] > 0
    assert {row["mode"] for row in record["results"]} == {"forward", "forward+backward"}
    assert {"eager", "reference", "dispatched", "torch_native"} <= {row["candidate"] for row in record["results"]}
    for row in record["results"]:
        assert bool(row["refused"]) == (row["seconds"] is None), row
    for row in rows_of(record, "dispatched"):
        assert row["low"] <= row["seconds"] <= row["high"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["rounds"] >= 6
        assert min(row[name] for name in ("bytes", "flops", "peak_bytes", "roofline_share")) > 0
        assert "tokens 32 of 4096" in row["scaled"]
    said = capsys.readouterr()
    assert "glu Llama-3-8B float32: " in said.err  # progress
    assert "x eager (95 %)" in said.out


def test_attention_against_the_length(tmp_path: Path) -> None:
    """Tables for people and the three plots; the memory of eager grows with the square of the length, ours with it."""
    record = bench(tmp_path, "--only", "attention", "--peers", "none")
    text = (tmp_path / "bench.md").read_text()
    assert "## What users get" in text
    assert "| attention | Llama-3-8B | float32 | forward+backward | dispatched (" in text
    assert "- attention, Llama-3-8B: tokens 256 of 4096, heads 4 of 32" in text
    for name in ("ratio_to_eager.png", "roofline.png", "attention_length.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name
    peaks = {(row["candidate"], row["model"]): row["peak_bytes"] for row in record["results"]}
    assert peaks["eager", "length 1024"] > 10 * peaks["eager", "length 256"]
    assert peaks["dispatched", "length 1024"] < 6 * peaks["dispatched", "length 256"]


def test_a_wrong_kernel_is_refused_and_never_timed(tmp_path: Path, monkeypatch: Patch) -> None:
    """A kernel that fails its proof is listed with what was wrong; only proofs have called it; the next one serves."""
    callers = set()

    def watched(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        callers.add(threading.current_thread().name)
        return wrong(x, up)

    put_in(monkeypatch, "broken", watched)
    record = bench(tmp_path, "--only", "glu", "--ops", "order=broken>torch_native", "--peers", "none")
    found = rows_of(record, "broken")
    assert found[0]["refused"].startswith("failed its proof: output is wrong")
    assert "quarantined" in found[1]["refused"]
    assert {row["seconds"] for row in found} == {None}
    assert callers == {"llm_adapt proof"}
    assert {row["source"] for row in rows_of(record, "dispatched")} == {"torch_native"}


def test_an_explicit_choice_never_falls_back(tmp_path: Path) -> None:
    """A library that was chosen and cannot serve is refused with its reason, and nothing takes its place."""
    record = bench(tmp_path, "--only", "glu", "--ops", "glu=apex", "--peers", "none")
    assert {(row["source"], row["seconds"]) for row in rows_of(record, "dispatched")} == {("apex", None)}
    assert all(row["refused"] for row in rows_of(record, "dispatched"))
    record = bench(tmp_path, "--only", "glu", "--ops", "glu=reference", "--peers", "none")
    assert {row["source"] for row in rows_of(record, "dispatched")} == {"reference"}


def test_a_wrong_eager_function_is_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    """What stands for a framework is proved as well: a formulation of something else is no yardstick."""
    monkeypatch.setitem(counterparts.EAGER, "glu", [Kernel("glu", "eager", wrong, "this test")])
    record = bench(tmp_path, "--only", "glu", "--peers", "none")
    assert "this test: failed its proof: output is wrong" in rows_of(record, "eager")[0]["refused"]
    assert {row["ratio"] for row in rows_of(record, "dispatched")} == {None}


def test_check_finds_a_slow_kernel(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """With --check the exit code is 1 when what dispatch serves is slower than eager; without it 0; both list it."""
    put_in(monkeypatch, "sleepy", slow)
    asked = ("--only", "glu", "--ops", "order=sleepy", "--peers", "none")
    record = bench(tmp_path, *asked, "--check", code=1)
    listed = [["glu", "Llama-3-8B", "float32", "forward"], ["glu", "Llama-3-8B", "float32", "forward+backward"]]
    assert record["slower_than_eager"] == listed
    assert "slower than eager: glu Llama-3-8B float32 forward: sleepy is 0." in capsys.readouterr().err
    assert bench(tmp_path, *asked)["slower_than_eager"] == listed


def test_a_less_accurate_eager_function_is_no_yardstick(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """A kernel that is slower, and three times as accurate, is listed with how much, and --check passes."""

    def rounded(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        return right(x, up) * (1 + 4e-6)

    put_in(monkeypatch, "sleepy", slow)
    monkeypatch.setitem(counterparts.EAGER, "glu", [Kernel("glu", "eager", rounded, "this test")])
    record = bench(tmp_path, "--only", "glu", "--ops", "order=sleepy", "--peers", "none", "--check")
    assert record["slower_than_eager"] == []
    assert ["glu", "Llama-3-8B", "float32", "forward"] in record["slower_and_more_accurate"]
    row = rows_of(record, "dispatched")[0]
    assert row["eager_error"] > 3 * row["error"] > 0
    assert "whose error is" in capsys.readouterr().err


def test_check_passes_where_eager_is_slower(tmp_path: Path, monkeypatch: Patch) -> None:
    """With --check the exit code is 0 when nothing that dispatch serves is slower than eager."""
    monkeypatch.setitem(counterparts.EAGER, "glu", [Kernel("glu", "eager", slow, "this test")])
    record = bench(tmp_path, "--only", "glu", "--peers", "none", "--check")
    assert record["slower_than_eager"] == []
    assert min(row["ratio"] for row in rows_of(record, "dispatched")) > 1


def test_frameworks_keep_their_own_code(monkeypatch: Patch, tmp_path: Path) -> None:
    """While eager is timed, transformers' functions are its own: llm_adapt has not put its operators in their place."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    own = llama.LlamaRMSNorm.forward
    seen = []
    plain = eager.llama_rms_norm

    def watched(x: torch.Tensor, weight: torch.Tensor, eps: float, form: str) -> Any:
        seen.append(llama.LlamaRMSNorm.forward is own)
        return plain(x, weight, eps, form)

    monkeypatch.setitem(counterparts.EAGER, "rms_norm", [Kernel("rms_norm", "eager", watched, "this test")])
    bench(tmp_path, "--only", "rms_norm", "--peers", "none")
    assert set(seen) == {True}
    assert not llm_adapt.is_patched()


def test_compiled_eager_is_a_candidate(tmp_path: Path) -> None:
    """--peers inductor times the eager function as torch.compile makes it."""
    pytest.importorskip("torch._inductor")
    record = bench(tmp_path, "--only", "glu", "--peers", "inductor")
    found = rows_of(record, "inductor")
    assert [row["refused"] for row in found] == ["", ""]
    assert found[0]["source"] == "torch.compile of transformers LlamaMLP: act_fn(gate) * up"


def test_absent_peers_are_listed(tmp_path: Path) -> None:
    """A package that is not installed is listed once, with the error of its import."""
    record = bench(tmp_path, "--only", "router_z_loss", "--peers", "flag_gems,liger")
    for name, package in (("flag_gems", "flag_gems"), ("liger", "liger_kernel")):
        if name in record["absent"]:
            assert record["absent"][name] == f"ModuleNotFoundError: No module named '{package}'"
    assert "torch_npu" not in record["absent"]  # not asked for


def test_list_times_nothing(capsys: Capture) -> None:
    """--list shows the cases with what is narrowed, and the candidates of each operator."""
    assert main(["bench", "--list", "--device", "cpu", "--only", "linear"]) == 0
    said = capsys.readouterr()
    assert "tokens 256 of 4096, hidden 512 of 4096, vocabulary 32064 of 128256" in said.out
    assert "none: frameworks have fp8 products through TransformerEngine or torchao only" in said.out
    assert "GB/s" not in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "zzz"), "no operator with a benchmark is named so: "),
        (("--dtype", "int8"), "pass float32, bfloat16, float16 or float64"),
        (("--peers", "lyger"), "--peers lyger was asked; there are: all, none, "),
        (("--ops", "order=tritn"), "did you mean triton"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str, capsys: Capture) -> None:
    """A wrong option is one error on one screen, before anything is measured; nothing stays patched."""
    assert main(["bench", *words]) == 78
    said = capsys.readouterr().err
    assert message in said
    assert "GB/s" not in said
    assert not llm_adapt.is_patched()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    """It is said before anything is measured."""
    (tmp_path / "file").write_text("")
    assert main([*SHORT, "--out", str(tmp_path / "file" / "folder")]) == 78
    assert "it cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "x"])
def test_a_time_that_is_none(seconds: str, capsys: Capture) -> None:
    """--seconds is a number above 0."""
    with pytest.raises(SystemExit, match="2"):
        main(["bench", f"--seconds={seconds}"])
    assert "--seconds" in capsys.readouterr().err


def test_stopping_keeps_what_was_measured(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Ctrl-C during the second case: the first is printed and written, and the exit code says that it was stopped."""
    from llm_adapt.cli.bench import measure

    real, calls = measure.measure, []

    def stopped(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measure, "measure", stopped)
    record = bench(tmp_path, "--only", "rms_norm", "--peers", "none", code=130)
    assert {row["op"] for row in record["results"]} == {"rms_norm"}
    assert record["stopped"] is True
    assert "stopped; what was measured so far follows" in capsys.readouterr().err


def test_a_candidate_that_cannot_run_is_listed(tmp_path: Path, monkeypatch: Patch) -> None:
    """One that holds its proof and then raises, as for want of memory, is refused with what it raised."""

    def hungry(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        if threading.current_thread().name != "llm_adapt proof":
            raise torch.OutOfMemoryError("no memory left\nand more")
        return right(x, up)

    put_in(monkeypatch, "hungry", hungry)
    record = bench(tmp_path, "--only", "glu", "--peers", "hungry")
    assert {row["refused"] for row in rows_of(record, "hungry")} == {"raised OutOfMemoryError: no memory left"}
    assert all(row["seconds"] for row in rows_of(record, "eager"))


def test_check_fails_where_what_serves_cannot_run(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """A dispatched call that raises at full size has no time to compare: it is told, and --check does not pass."""

    def hungry(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        if threading.current_thread().name != "llm_adapt proof":
            raise torch.OutOfMemoryError("no memory left")
        return right(x, up)

    put_in(monkeypatch, "hungry", hungry)
    bench(tmp_path, "--only", "glu", "--ops", "order=hungry", "--peers", "none", "--check", code=1)
    assert "cannot run: glu Llama-3-8B float32 forward: hungry raised OutOfMemoryError" in capsys.readouterr().err
