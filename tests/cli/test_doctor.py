"""llm-adapt doctor: what this machine has, what would be chosen and why, what is broken."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_adapt.adapters import Finding, FindingKind
from llm_adapt.cli import doctor, doctor_start, render
from llm_adapt.cli.doctor_checks import EXIT_CODES, Diagnosis, examine
from llm_adapt.cli.doctor_start import PLAIN, Start
from llm_adapt.errors import DeviceError
from tests.adapters.broken_plugin import install, python
from tests.adapters.fake_host import FakeHost

RUN = """
import argparse, sys
from llm_adapt.cli.doctor import add_parser
parser = argparse.ArgumentParser("llm-adapt")
add_parser(parser.add_subparsers(required=True))
args = parser.parse_args({args!r})
code = args.func(args)
assert "torch" not in sys.modules, "the doctor imported torch"
sys.exit(code)
"""


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    """A machine with a CPU build of torch and nothing else."""
    return FakeHost(tmp_path).torch("2.13.0+cpu")


def run(*args: str, site: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `llm-adapt doctor` in a child process."""
    return python(RUN.format(args=["doctor", *args]), *([site] if site else []), **environ)


def look(fake: FakeHost, requested: str | None = None) -> Diagnosis:
    """Examine without starting torch."""
    return examine(fake.host, requested, None)


def broken(diagnosis: Diagnosis) -> list[str]:
    """Findings as lines."""
    return [found.line for found in diagnosis.findings]


# -- exit codes --------------------------------------------------------------------------------------------


def test_each_class_of_finding_has_its_own_exit_code() -> None:
    """Every class of finding but a note exits with its own code, none with 0, 1 or argparse's 2."""
    codes = [code for kind, code in EXIT_CODES.items() if kind is not FindingKind.NOTE]
    assert sorted(set(codes)) == sorted(codes)
    assert min(codes) > 2
    assert set(EXIT_CODES) == set(FindingKind)


def test_healthy_machine_exits_with_zero(fake: FakeHost) -> None:
    """A machine with nothing broken has no finding and exit code 0."""
    diagnosis = look(fake)
    assert (broken(diagnosis), diagnosis.exit_code) == ([], 0)


def test_note_alone_exits_with_zero(fake: FakeHost) -> None:
    """Something worth knowing that breaks nothing does not change the exit code."""
    fake.npu().environ["PYTORCH_CUDA_ALLOC_CONF"] = "x"
    diagnosis = look(fake)
    assert [found.kind for found in diagnosis.findings] == [FindingKind.NOTE]
    assert diagnosis.exit_code == 0


def test_most_severe_finding_comes_first_and_decides(fake: FakeHost) -> None:
    """With several findings the most severe one is listed first and gives the exit code."""
    fake.npu(torch="2.9.0+cpu").environ["LLM_ADAPT_DEVCE"] = "npu"
    diagnosis = look(fake)
    assert [EXIT_CODES[found.kind] for found in diagnosis.findings] == [11, 12]
    assert diagnosis.exit_code == 11


def exit_code(fake: FakeHost) -> int:
    """Exit code after a look at this machine."""
    return look(fake).exit_code


def test_exit_code_of_a_plugin_that_lacks_its_libraries(fake: FakeHost) -> None:
    """A plug-in without its vendor's libraries exits with 10."""
    fake.npu()
    (fake.root / "usr/lib/libascendcl.so").unlink()
    assert exit_code(fake) == 10


def test_exit_code_of_versions(fake: FakeHost) -> None:
    """A plug-in that does not pair with torch exits with 11."""
    assert exit_code(fake.mlu(torch="2.9.0+cpu")) == 11


def test_exit_code_of_environment(fake: FakeHost) -> None:
    """Masks that disagree exit with 12."""
    fake.dcu().environ.update(HIP_VISIBLE_DEVICES="0", CUDA_VISIBLE_DEVICES="1")
    assert exit_code(fake) == 12


def test_exit_code_of_permissions(fake: FakeHost) -> None:
    """A closed device node exits with 13."""
    fake.cuda().closed.add("/dev/nvidia0")
    assert exit_code(fake) == 13


def test_exit_code_of_packages(fake: FakeHost) -> None:
    """A GPU with a CPU torch exits with 14."""
    assert exit_code(fake.cuda().torch("2.13.0+cpu")) == 14


def test_exit_code_of_a_masked_device(fake: FakeHost) -> None:
    """A masked device exits with 15 and names the variable."""
    fake.cuda().environ["CUDA_VISIBLE_DEVICES"] = ""
    diagnosis = look(fake)
    assert diagnosis.exit_code == 15
    assert "all masked by CUDA_VISIBLE_DEVICES=''. Unset the variable" in broken(diagnosis)[0]


# -- what is looked at -------------------------------------------------------------------------------------


def test_masked_device_is_no_finding_when_the_cpu_was_asked_for(fake: FakeHost) -> None:
    """Who asks for the CPU has accepted that the masked device is not used."""
    fake.cuda().environ.update(CUDA_VISIBLE_DEVICES="", LLM_ADAPT_DEVICE="cpu")
    diagnosis = look(fake)
    assert (broken(diagnosis), diagnosis.requested) == ([], "cpu")


def test_login_node_is_told(fake: FakeHost) -> None:
    """A plug-in without its device is reported; a CUDA build of torch without a GPU is not."""
    assert broken(look(fake.torch("2.9.1+cu128", cuda="12.8"))) == []
    fake.mlu()
    for node in ("cambricon_dev0", "cambricon_dev1"):
        (fake.root / "dev" / node).unlink()
    assert "there is no /dev/cambricon_dev*" in broken(look(fake))[0]


def test_two_devices_are_reported_as_ambiguous(fake: FakeHost) -> None:
    """Two devices at once leave nothing chosen, exit 15 and name both."""
    diagnosis = look(fake.mlu().npu(torch="2.7.1+cpu", plugin="2.7.1"))
    assert diagnosis.detection is None
    assert diagnosis.exit_code == 15
    assert "2 are here: mlu" in broken(diagnosis)[0]
    assert " and npu " in broken(diagnosis)[0]


def test_device_option_wins_over_the_variable(fake: FakeHost) -> None:
    """--device asks as patch(device=...) would, over LLM_ADAPT_DEVICE."""
    fake.environ["LLM_ADAPT_DEVICE"] = "npu"
    assert "LLM_ADAPT_DEVICE asked for 'npu', which is not here" in broken(look(fake))[0]
    diagnosis = look(fake, "cpu")
    assert diagnosis.detection
    assert diagnosis.detection.reason == "asked for by --device; always available"


def test_unknown_setting_is_reported_with_the_nearest(fake: FakeHost) -> None:
    """A misspelt LLM_ADAPT_* variable is reported with the name that was meant."""
    fake.environ["LLM_ADAPT_STRCT"] = "1"
    assert "Did you mean LLM_ADAPT_STRICT?" in broken(look(fake))[0]
    fake.environ.pop("LLM_ADAPT_STRCT")
    assert broken(look(fake)) == []


def test_missing_torch_is_reported(tmp_path: Path) -> None:
    """Without torch the doctor says so and does not try to start it."""
    diagnosis = examine(FakeHost(tmp_path).host, None, lambda device: pytest.fail("torch was started"))
    assert [found.what for found in diagnosis.findings] == ["torch is not installed."]


def test_two_tritons_are_reported(fake: FakeHost) -> None:
    """Two distributions that own triton/ are reported, one is not."""
    fake.dist("triton", "3.5.1", ("triton/__init__.py",))
    assert broken(look(fake)) == []
    fake.dist("triton_ascend", "3.2.0", ("triton/__init__.py",))
    assert broken(look(fake))[0].startswith("triton 3.5.1 and triton_ascend 3.2.0 share the folder triton/")


def test_apex_of_another_project_is_reported(fake: FakeHost) -> None:
    """PyPI's unrelated apex is reported, NVIDIA's is not."""
    fake.package("apex", "0.9.10.dev0")
    assert broken(look(fake))[0].startswith("apex 0.9.10.dev0 is not NVIDIA's apex")
    (fake.site / "apex" / "normalization").mkdir()
    assert broken(look(fake)) == []


@pytest.mark.parametrize("core", ["transformer_engine/libtransformer_engine.so", "transformer_engine_torch.cpython.so"])
def test_transformer_engine_without_core_is_reported(fake: FakeHost, core: str) -> None:
    """The Python-only wheel of transformer_engine is reported; with a compiled core beside it, it is not."""
    fake.package("transformer_engine", "2.20.2")
    assert broken(look(fake))[0].startswith("transformer_engine 2.20.2 has no compiled core")
    (fake.site / core).touch()
    assert broken(look(fake)) == []


def test_two_plugins_are_worth_a_note(fake: FakeHost) -> None:
    """Two plug-ins that `import torch` would load are noted; one is not."""
    fake.dist("torch_npu", "2.13.0", entry_points="[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    assert broken(look(fake)) == []
    fake.dist("flagcx", "1.0", entry_points="[torch.backends]\nflagcx = flagcx:init\n")
    assert broken(look(fake))[0].startswith("`import torch` loads 2 plug-ins: flagcx, torch_npu.")


# -- what is tried -----------------------------------------------------------------------------------------

PLUGIN = Finding(FindingKind.PLUGIN, "it fails", "mend", "npu")


def tried(fake: FakeHost, requested: str | None = None, **failing: Finding) -> tuple[list[str], Diagnosis]:
    """Examine with a pretended start that fails for these devices ("plain" for the plain import)."""
    acts: list[str] = []

    def start(device: str) -> Start:
        acts.append(device)
        return Start(device, device, 0.1, finding=failing.get(device or "plain"))

    return acts, examine(fake.host, requested, start)


def without_cann(fake: FakeHost) -> FakeHost:
    """An Ascend node whose set_env.sh was not sourced."""
    fake.npu().dist("torch_npu", "2.13.0", entry_points="[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (fake.root / "usr/lib/libhccl.so").unlink()
    return fake


def test_only_the_chosen_device_is_tried_without_plugins(fake: FakeHost) -> None:
    """Without an autoload entry point one start is enough."""
    assert tried(fake)[0] == ["cpu"]


def test_plain_import_is_tried_where_a_plugin_autoloads(fake: FakeHost) -> None:
    """With an autoload entry point the plain import is another act and is tried first, unless it is off."""
    assert tried(without_cann(fake), "cpu")[0] == [PLAIN, "cpu"]
    fake.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    assert tried(fake, "cpu")[0] == ["cpu"]


def test_start_that_fails_replaces_what_was_presumed(fake: FakeHost) -> None:
    """When torch was tried and failed, that finding stands instead of the presumed one, once."""
    again = Finding(FindingKind.PLUGIN, "it fails again", PLUGIN.mend, PLUGIN.device)
    diagnosis = tried(without_cann(fake), plain=PLUGIN, npu=again)[1]
    assert broken(diagnosis) == ["it fails mend"]


def test_start_that_works_refutes_what_was_presumed(fake: FakeHost) -> None:
    """When torch starts with the plug-in, a presumed missing library is no finding."""
    assert broken(look(without_cann(fake))) != []
    assert broken(tried(fake)[1]) == []


def test_start_of_the_cpu_refutes_nothing_about_the_npu(fake: FakeHost) -> None:
    """With autoload off the CPU starts, and the NPU's plug-in is still reported as broken."""
    without_cann(fake).environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    assert "CANN's libhccl.so cannot be found" in broken(tried(fake, "cpu")[1])[0]


def test_nothing_is_activated_when_nothing_is_chosen(fake: FakeHost) -> None:
    """When detection fails no device is tried."""
    assert tried(fake, "nup")[0] == []


def test_start_that_hangs_is_a_finding(tmp_path: Path) -> None:
    """A start that does not end in time is a finding, not a hang of the doctor."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\ntime.sleep(600)", encoding="utf-8")
    found = doctor_start.start("cpu", 1.5, {"PYTHONPATH": str(tmp_path)}).finding
    assert found
    assert found.what == "llm_adapt on cpu did not finish in 1.5 s."


def test_start_that_crashes_is_a_finding(tmp_path: Path) -> None:
    """A start that dies by a signal is a finding with the signal and the last line that was printed."""
    (tmp_path / "torch").mkdir()
    crash = "import os, sys\nprint('libhccl.so: cannot open shared object', file=sys.stderr, flush=True)\nos.abort()"
    (tmp_path / "torch" / "__init__.py").write_text(crash, encoding="utf-8")
    found = doctor_start.start(PLAIN, 60, {"PYTHONPATH": str(tmp_path)}).finding
    assert found
    assert found.device == "npu"
    assert "set_env.sh" in found.mend
    assert found.what == "`import torch` died with signal SIGABRT: libhccl.so: cannot open shared object"


def test_plugin_that_prints_does_not_confuse_the_doctor(tmp_path: Path) -> None:
    """What a package prints while it is imported is not taken for the answer."""
    (tmp_path / "torch").mkdir()
    noise = "print('{}')\nimport atexit\natexit.register(print, 'bye')"
    (tmp_path / "torch" / "__init__.py").write_text(noise, encoding="utf-8")
    assert doctor_start.start(PLAIN, 60, {"PYTHONPATH": str(tmp_path)}).finding is None


# -- the command -------------------------------------------------------------------------------------------


def test_doctor_explains_a_broken_torch_npu(tmp_path: Path) -> None:
    """With torch_npu installed and CANN absent: cause, mend, exit code 10, and that llm_adapt runs on the CPU."""
    done = run("--json", site=install(tmp_path))
    told = json.loads(done.stdout)
    assert (done.returncode, told["exit_code"], told["chosen"]) == (10, 10, "cpu")
    assert [(one["act"], one["ok"]) for one in told["starts"]] == [
        ("`import torch`", False),
        ("llm_adapt on cpu", True),
    ]
    first = told["findings"][0]
    assert (first["kind"], first["device"]) == ("plugin", "npu")
    assert "`import torch` fails: torch_npu is installed, but CANN's libascendcl.so" in first["what"]
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in first["mend"]
    assert "Traceback" not in done.stdout + done.stderr


def test_doctor_of_this_machine_in_words() -> None:
    """The text says which devices are here, what is chosen, and what each finding's mend is."""
    done = run("--no-start", "--device", "nup")
    assert done.returncode == 15
    assert "Devices\n  name  here" in done.stdout
    assert "Chosen: none\n" in done.stdout
    assert "  15 --device asked for 'nup', which is no device. Did you mean 'npu'?\n     -> Change" in done.stdout


def test_doctor_fits_on_a_screen(tmp_path: Path) -> None:
    """The text about one broken plug-in has fewer lines than a terminal."""
    assert len(run("--no-start", site=install(tmp_path)).stdout.splitlines()) <= 24


def test_help_documents_every_exit_code() -> None:
    """--help lists every exit code with its meaning, and examples."""
    text = run("--help").stdout
    assert all(f"  {code:>2}  {kind.value}" in text for kind, code in EXIT_CODES.items() if code)
    assert "examples:\n  llm-adapt doctor" in text


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_timeout_must_be_a_length_of_time(seconds: str) -> None:
    """A timeout that is no length of time is a usage error."""
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit) as raised:
        parser.parse_args(["doctor", "--timeout", seconds])
    assert raised.value.code == 2


# -- what is printed ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_table_is_aligned() -> None:
    """Off a terminal a table is aligned text without trailing blanks."""
    file = io.StringIO()
    render.table("T", ("a", "bb"), [("xxx", 1), ("y", "")], file)
    assert file.getvalue() == "T\n  a    bb\n  xxx  1\n  y\n"


def test_terminal_table_keeps_brackets() -> None:
    """On a terminal rich prints the table and takes no cell for markup."""
    pytest.importorskip("rich")
    file = Terminal()
    render.table("T", ("a",), [("/dev/nvidia[0-9]*",), ("[bold]x",)], file)
    assert "/dev/nvidia[0-9]*" in file.getvalue()
    assert "[bold]x" in file.getvalue()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR an error on a terminal has no colour."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    render.error(DeviceError("no [device]"), coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    render.error(DeviceError("no [device]"), plain)
    assert "\x1b[31m" in coloured.getvalue()
    assert plain.getvalue() == "llm-adapt: DeviceError: no [device]\n"


def test_without_rich_a_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rich everything is printed as plain text."""
    monkeypatch.setitem(sys.modules, "rich", None)
    file = Terminal()
    render.heading("Chosen", file)
    render.paragraph("a\nb", 2, file)
    assert file.getvalue() == "Chosen\n  a\n  b\n"
