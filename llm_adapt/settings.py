"""All settings of llm_adapt in one table: an LLM_ADAPT_* variable or the patch() argument of the same name.

The argument wins over the variable. An unknown LLM_ADAPT_* variable is an error, because a misspelt
setting that is silently ignored costs its user a night.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from llm_adapt.errors import SettingsError

__all__ = ["PREFIX", "SETTINGS", "Setting", "Settings", "cache_folder", "read_environment", "resolve"]

PREFIX = "LLM_ADAPT_"


@dataclass(frozen=True)
class Settings:
    """Values in force. Field names are the patch() arguments."""

    device: str | None = None
    simulate: str | None = None
    strict: bool = False
    cpu_devices: int | None = None
    out: str | None = None
    ops: str | None = None
    proof: str = "first"
    cache: str | None = None


class Setting(NamedTuple):
    """One row of the table: how a value is read from text, and what it means."""

    name: str
    parse: Callable[[str], Any]
    accepts: str
    meaning: str

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return PREFIX + self.name.upper()


def _text(raw: str) -> str:
    if not raw.strip():
        raise ValueError("empty")
    return raw.strip()


def _flag(raw: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    return words[raw.strip().lower()]


def _count(raw: str) -> int:
    number = int(raw)
    if not 1 <= number <= 1024:
        raise ValueError("out of range")
    return number


def _proof(raw: str) -> str:
    word, _, number = raw.strip().partition(":")
    if word not in ("off", "first", "strict") and not (word == "sample" and number.isdigit() and int(number) > 0):
        raise ValueError("unknown")
    if number and word != "sample":
        raise ValueError("takes no number")
    return raw.strip()


SETTINGS: dict[str, Setting] = {
    row.name: row
    for row in (
        Setting("device", _text, "cuda, npu, mlu, dcu, cpu", "Device to use instead of the detected one."),
        Setting(
            "simulate", _text, "npu, mlu or dcu, with :MODEL if you like",
            "Run on a simulated device on host memory, never chosen by itself (docs/simulators.md).",
        ),
        Setting("strict", _flag, "1 or 0", "Turn every reported skip or mismatch into an error."),
        Setting(
            "cpu_devices", _count, "1 to 1024",
            "How many CUDA ordinals the CPU presents; default: LOCAL_WORLD_SIZE, else 1.",
        ),
        Setting("out", _text, "a folder", "Folder that receives report.json (report.rankN.json for N > 0) at exit."),
        Setting(
            "ops", _text, "OP=LIBRARY, -LIBRARY, order=A>B, ..., the path of a TOML file, or off",
            "Which kernel library serves which op (docs/ops.md); default: the device's own order. off: frameworks keep "
            "their own code.",
        ),
        Setting(
            "proof", _proof, "off, first, strict or sample:N",
            "When a kernel is proved against the reference: never, before it first serves, so with a failure as an "
            "error, or again at each N-th call.",
        ),
        Setting(
            "cache", _text, "a folder",
            "Where simulators and the CPU's kernels are built; default: llm_adapt in XDG_CACHE_HOME or ~/.cache.",
        ),
    )
}  # fmt: skip


def read_environment(environ: Mapping[str, str] | None = None) -> Settings:
    """Read every LLM_ADAPT_* variable.

    Raises:
        SettingsError: a variable is unknown (with the nearest known name) or its value does not parse.
    """
    environ = os.environ if environ is None else environ
    by_variable = {row.variable: row for row in SETTINGS.values()}
    values: dict[str, Any] = {}
    for variable in sorted(name for name in environ if name.startswith(PREFIX)):
        row = by_variable.get(variable)
        if row is None:
            raise SettingsError(_unknown(f"environment variable {variable}", variable, by_variable))
        try:
            values[row.name] = row.parse(environ[variable])
        except (ValueError, KeyError):
            raise SettingsError(
                f"{variable}={environ[variable]!r} was set; accepted: {row.accepts}. Correct or unset it."
            ) from None
    return Settings(**values)


def resolve(environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
    """Settings in force: patch() arguments over environment variables over defaults.

    Raises:
        SettingsError: an argument is unknown or has a wrong type, or the environment is wrong.
    """
    settings = read_environment(environ)
    known = {field.name for field in fields(Settings)}
    for name, value in arguments.items():
        if name not in known:
            raise SettingsError(_unknown(f"patch() argument {name!r}", name, known))
        if value is None:
            continue
        settings = replace(settings, **{name: _checked(SETTINGS[name], value)})
    return settings


def _checked(row: Setting, value: Any) -> Any:
    """Accept a Python value exactly where its text would be accepted."""
    try:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        parsed = row.parse(str(value))
    except (ValueError, KeyError):
        parsed = None
    if parsed != value or isinstance(parsed, bool) != isinstance(value, bool):
        raise SettingsError(f"patch({row.name}={value!r}) was asked; accepted: {row.accepts}.")
    return parsed


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    by_ending = {item.removeprefix(PREFIX): item for item in known}  # what all have in common makes all look near
    near = difflib.get_close_matches(name.removeprefix(PREFIX), by_ending, n=1, cutoff=0.6)
    hint = f" Did you mean {by_ending[near[0]]}?" if near else ""
    return f"Unknown {what}.{hint} Known: {', '.join(sorted(by_ending.values()))}."


def cache_folder() -> Path:
    """Where things are fetched and built: LLM_ADAPT_CACHE, else XDG_CACHE_HOME/llm_adapt, else ~/.cache/llm_adapt."""
    base = os.environ.get("LLM_ADAPT_CACHE")
    if base:
        return Path(base).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "llm_adapt"
