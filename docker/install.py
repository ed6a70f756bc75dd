#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Install llm-adapt into an image without replacing the torch that the image came with.

    python3 docker/install.py [--with "REQUIREMENT ..."] SOURCE

A vendor's torch is its own build (`2.9.0+das.opt1.dtk2604`, `2.7.1+cpu` beside torch_mlu); the wheel of the
same name on PyPI cannot drive the device. So:

1. every vendor build that is installed is pinned in a constraints file: the packages named torch* or triton*,
   numpy, and each distribution whose version carries a local label (`+das...`, `+mlu...`, `+cpu`);
2. SOURCE is installed with `--no-deps`, the extra requirements of --with under the same constraints;
3. the pins, and the contents of torch's own files, are compared with what they were.

Any difference ends the build with status 1. torch is never imported: without its driver it may raise
(Ascend, DCU). Needs the Python of the image and its pip, nothing else.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# numpy too: the vendors' extensions are built against the one they ship (DTK's against 1.x).
PINNED_NAMES = re.compile(r"^(torch|triton|numpy$)")


class InstallError(Exception):
    """The image would not be what was asked. Says what was asked, what was found, what to do."""

    def __init__(self, asked, found, do):
        super().__init__(f"install.py: asked: {asked}\n            found: {found}\n            do:    {do}")


def vendor_builds():
    """Name -> version of the installed distributions that must stay as they are."""
    pins = {}
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        if not name or not version:  # a broken dist-info cannot be pinned, and pip ignores it as well
            continue
        name = re.sub(r"[-_.]+", "-", name).lower()
        if PINNED_NAMES.match(name) or "+" in version:
            pins.setdefault(name, version)  # the first on sys.path is the one that Python imports
    return pins


def torch_files():
    """Path -> SHA-256 of torch/__init__.py and torch/version.py, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return {}
    paths = [Path(spec.origin), Path(spec.origin).with_name("version.py")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def snapshot():
    """State to keep, read by a fresh interpreter: pip may add a site folder that this one has never seen."""
    answer = subprocess.run([sys.executable, __file__, "--snapshot"], check=True, stdout=subprocess.PIPE)
    return json.loads(answer.stdout.decode())


def changes(before, after):
    """One line for each pin or torch file of `before` that `after` does not have unchanged."""
    lines = []
    for name, version in sorted(before["pins"].items()):
        now = after["pins"].get(name)
        if now != version:
            lines.append(f"{name} {version} -> {now or 'removed'}")
    if before["files"] != after["files"]:
        for path in sorted({*before["files"], *after["files"]}):
            if before["files"].get(path) != after["files"].get(path):
                lines.append(f"{path} was changed, added or removed")
    return lines


def pip(*arguments):
    """Run pip of this interpreter; True when it succeeded. Its own words go to the build log."""
    command = [sys.executable, "-m", "pip", *arguments]
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode == 0


def install(source, requirements, torch_version, constraints):
    """The two pip calls of an image build.

    Raises:
        InstallError: pip refused.
    """
    if not pip("install", "--no-cache-dir", "--no-deps", "--constraint", constraints, source):
        raise InstallError(
            f"install {source} without its dependencies",
            "pip failed; its message stands above",
            "mend what pip names: usually the Python of the image is too old or the build has no network",
        )
    if requirements and not pip("install", "--no-cache-dir", "--constraint", constraints, *requirements):
        raise InstallError(
            f"install {' '.join(requirements)} and keep torch {torch_version}",
            "pip failed; its message stands above. A package that wants another torch, torchvision or triton "
            "conflicts with the builds pinned from this image",
            "choose versions that accept them, or take a BASE_IMAGE whose torch they accept",
        )


def require_torch(before):
    """Version of the installed torch.

    Raises:
        InstallError: there is none.
    """
    if "torch" not in before["pins"] or not before["files"]:
        raise InstallError(
            "install llm-adapt beside the torch of the base image",
            f"no torch in {sys.executable} (Python {sys.version.split()[0]})",
            "take a BASE_IMAGE that has torch; where torch lives in a virtual environment, put its bin folder "
            "first on PATH (Dockerfile.mlu: --build-arg VENV=/folder)",
        )
    return before["pins"]["torch"]


def require_kept(before, after):
    """Compare two snapshots.

    Raises:
        InstallError: a pinned build or a file of torch differs.
    """
    lines = changes(before, after)
    if lines:
        raise InstallError(
            "keep the builds that the image came with",
            "; ".join(lines),
            "do not install the package that replaces them; this layer must not be used",
        )


def require_usable():
    """llm-adapt's own requirements are met (setup.py has none today) and its command is on PATH.

    Raises:
        InstallError: one of them is not.
    """
    check = subprocess.run([sys.executable, "-m", "pip", "check"], check=False, stdout=subprocess.PIPE)
    # Only our own lines: vendor images are often inconsistent in packages that are no concern of ours.
    lines = check.stdout.decode().splitlines()
    ours = [line for line in lines if line.replace("_", "-").startswith("llm-adapt ")]
    if ours:
        raise InstallError("requirements of llm-adapt met by the image", "; ".join(ours), "take a newer BASE_IMAGE")
    if shutil.which("llm-adapt") is None:
        raise InstallError(
            "the command llm-adapt on PATH",
            f"PATH={os.environ.get('PATH', '')}",
            f"add the scripts folder of {sys.executable} to PATH with ENV before this step",
        )


def main(arguments):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="folder or wheel of llm-adapt")
    parser.add_argument("--with", dest="requirements", default="", help="more requirements, separated by spaces")
    parser.add_argument("--snapshot", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.snapshot:
        print(json.dumps({"pins": vendor_builds(), "files": torch_files()}))
        return 0
    if not options.source:
        parser.error("SOURCE is missing")
    try:
        before = snapshot()
        torch_version = require_torch(before)
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder, "vendor-builds.txt")
            constraints.write_text("".join(f"{name}=={version}\n" for name, version in before["pins"].items()))
            try:
                install(options.source, options.requirements.split(), torch_version, str(constraints))
            finally:  # also after a failed pip: that torch was replaced is the worse news
                require_kept(before, snapshot())
        require_usable()
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"install.py: llm-adapt installed; torch {torch_version} kept ({next(iter(before['files']))})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
