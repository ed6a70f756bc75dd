#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Replay the pip steps of a Dockerfile in a virtual environment, where no container engine is at hand.

    python docker/replay.py docker/Dockerfile.cpu FOLDER [NAME=VALUE ...]

FOLDER becomes the image: FOLDER/root holds what COPY brings and nothing else, FOLDER/venv is its Python; ARG and
ENV keep their values, NAME=VALUE stands for --build-arg. Then the CMD of HEALTHCHECK is run. Not replayed, and
printed as such: FROM and steps that make users. So this proves that the COPY lines bring all that the install
needs and that the pip steps work; it proves nothing of the base image.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

Step = tuple[str, str]
NOT_REPLAYED = re.compile(r"useradd ")
OF_THE_CALLER = re.compile(r"PYTHON|VIRTUAL_ENV$|LLM_ADAPT_")  # an image knows none of these
CONTEXT = Path(__file__).resolve().parents[1]


def instructions(text: str) -> list[Step]:
    """(instruction, rest) of a Dockerfile: continuation lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    split = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest) for word, rest in split]


def copies(rest: str) -> tuple[list[str], str]:
    """(sources in the build context, destination) of a COPY; no sources when it copies from another stage."""
    words = rest.split()
    paths = [word for word in words if not word.startswith("--")]
    from_context = not any(word.startswith("--from") for word in words)
    return (paths[:-1] if from_context else []), paths[-1]


def assignments(rest: str) -> dict[str, str]:
    """NAME=VALUE pairs of an ARG or ENV, unquoted; variables in the values are left as they stand."""
    return dict(word.partition("=")[::2] for word in shlex.split(rest))


def missing_sources(steps: list[Step], context: Path = CONTEXT) -> list[str]:
    """Sources of COPY that the build context does not have."""
    sources = [source for word, rest in steps if word == "COPY" for source in copies(rest)[0]]
    return [source for source in sources if not (context / source).exists()]


def bring(rest: str, root: Path, workdir: Path) -> None:
    """Do a COPY: a folder brings its contents, files go into a folder or get a new name."""
    sources, destination = copies(rest)
    target = root / destination.lstrip("/") if destination.startswith("/") else workdir / destination
    for source in (CONTEXT / name for name in sources):
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        elif destination.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def replay(dockerfile: Path, folder: Path, build_args: Mapping[str, str]) -> int:
    """Carry out the steps in order; the first status other than 0, else that of the health check."""
    root = folder / "root"
    workdir = root
    root.mkdir(parents=True)
    venv.create(folder / "venv", with_pip=True)
    path = [str(folder / "venv" / "bin"), str(root / "usr/local/bin"), os.environ["PATH"]]
    environment = {name: value for name, value in os.environ.items() if not OF_THE_CALLER.match(name)}
    environment["PATH"] = os.pathsep.join(path)
    check: list[str] = []
    for word, rest in instructions(dockerfile.read_text()):
        if word == "WORKDIR":
            workdir = root / rest.lstrip("/")
            workdir.mkdir(parents=True, exist_ok=True)
        elif word in ("ARG", "ENV"):
            values = assignments(rest)
            environment.update({name: build_args.get(name, value) for name, value in values.items()})
        elif word == "COPY":
            bring(rest, root, workdir)
        elif word == "HEALTHCHECK":
            check = json.loads(rest.partition("CMD ")[2])
        elif word == "RUN" and not NOT_REPLAYED.match(rest):
            print("RUN", rest, flush=True)
            status = subprocess.run(["sh", "-c", rest], cwd=workdir, env=environment, check=False).returncode
            if status:
                return status
        else:
            print("not replayed:", word, rest, flush=True)
    print("HEALTHCHECK", *check, flush=True)
    return subprocess.run(check, cwd=workdir, env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(replay(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), assignments(shlex.join(sys.argv[3:]))))
