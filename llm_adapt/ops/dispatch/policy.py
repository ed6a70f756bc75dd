"""Policy: which kernel library serves which op; one parser for patch(), LLM_ADAPT_OPS, a TOML file and a block.

As text, parts separated by commas:

    rms_norm=liger          this op by that library; never falls back: it works, or it raises
    *=reference             every op
    *.mlp.*:swiglu=triton   the op where a module of that name calls it
    -apex, -liger.rope      never this library, or this kernel
    order=torch_npu>triton  libraries in order of preference, in place of the device's own order
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_adapt.errors import SettingsError
from llm_adapt.ops.dispatch import registry

__all__ = ["Policy", "Proof", "amended", "parse_policy", "parse_proof"]

ANY = "*"


@dataclass(frozen=True)
class Proof:
    """When a kernel is proved against the reference.

    Attributes:
        at_first_use: before it serves a new kind of call.
        every: again at each so-many-th call; 0 = never again.
        raises: a failed proof is an error, not a fallback.
    """

    at_first_use: bool = True
    every: int = 0
    raises: bool = False

    @property
    def words(self) -> str:
        """The settings in words."""
        if not self.at_first_use:
            return "never"
        again = f", and at each {self.every}-th call" if self.every else ""
        return f"before they first serve{again}{', a failure is an error' if self.raises else ''}"


@dataclass(frozen=True, eq=False)  # told apart by identity: a policy put in force anew starts anew
class Policy:
    """Who may serve what.

    Attributes:
        order: kernel libraries in order of preference.
        deny: libraries, and kernels as "library.op", that never serve.
        choose: op, or "*", -> the library that must serve it.
        layers: (pattern of module names, op or "*", library), the first that matches counts.
        proof: when kernels are proved.
        strict: a fallback from a kernel that failed its proof is an error.
        cases: folder for saved cases of failed proofs; "" = none are saved.
        device: torch's name of the device that the process uses; "" = any.
    """

    order: tuple[str, ...] = ()
    deny: frozenset[str] = frozenset()
    choose: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[tuple[str, str, str], ...] = ()
    proof: Proof = Proof()
    strict: bool = False
    cases: str = ""
    device: str = ""

    def chosen(self, op: str, layer: str = "") -> str:
        """The library that must serve this op for this layer, "" when none was chosen."""
        for pattern, name, library in self.layers:
            if layer and name in (op, ANY) and fnmatch.fnmatchcase(layer, pattern):
                return library
        return self.choose.get(op, self.choose.get(ANY, ""))

    def has_layers(self, op: str) -> bool:
        """Whether the layer makes a difference for this op."""
        return any(name in (op, ANY) for _, name, _ in self.layers)

    def denies(self, op: str, library: str) -> bool:
        """Whether this kernel may never serve."""
        return library in self.deny or f"{library}.{op}" in self.deny


def parse_policy(text: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Read a policy: text as above, a mapping of the same parts, or the path of a TOML file with them.

    Returns:
        fields of Policy: those that were given among order, deny, choose, layers.

    Raises:
        SettingsError: an unknown op, library or part; with the nearest names. Or the file cannot be read.
    """
    if isinstance(text, Mapping):
        return _from_table(text, "the mapping")
    text = os.fspath(text)
    if text.endswith(".toml"):
        return _from_table(_read_toml(text), text)
    return _from_parts(part.strip() for part in text.replace(";", ",").replace("\n", ",").split(",") if part.strip())


def amended(policy: Policy, ops: str | os.PathLike[str] | Mapping[str, Any], proof: str | None = None) -> Policy:
    """A policy with some parts put over it; choices and denials are added, an order replaces the order.

    Raises:
        SettingsError: as `parse_policy`, or an unknown proof.
    """
    parts = parse_policy(ops)
    parts["choose"] = {**policy.choose, **parts.get("choose", {})}
    parts["layers"] = (*parts.get("layers", ()), *policy.layers)  # the first that matches counts
    parts["deny"] = policy.deny | parts.get("deny", frozenset())
    if proof is not None:
        try:
            parts["proof"] = parse_proof(proof)
        except ValueError as error:
            raise SettingsError(f"proof={proof!r} was asked; {error}.") from None
    return replace(policy, **parts)


def parse_proof(text: str) -> Proof:
    """Read "off", "first", "strict" or "sample:N".

    Raises:
        ValueError: anything else.
    """
    known = {"off": Proof(at_first_use=False), "first": Proof(), "strict": Proof(raises=True)}
    if text in known:
        return known[text]
    word, _, number = text.partition(":")
    if word != "sample" or not number.isdigit() or int(number) < 1:
        raise ValueError(f"{text!r} is none of off, first, strict, sample:N")
    return Proof(every=int(number))


def _from_parts(parts: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        if part.startswith("-"):
            found["deny"] = found.get("deny", frozenset()) | {_denied(part[1:].strip())}
            continue
        left, equals, right = (piece.strip() for piece in part.partition("="))
        if not equals or not left or not right:
            raise SettingsError(f"ops={part!r} was asked; write OP=LIBRARY, PATTERN:OP=LIBRARY, -LIBRARY or order=A>B.")
        if left == "order":
            found["order"] = tuple(_library(name.strip()) for name in right.split(">"))
        elif ":" in left:
            pattern, _, op = left.rpartition(":")
            found["layers"] = (*found.get("layers", ()), (pattern, _op(op), _library(right)))
        else:
            found["choose"] = found.get("choose", {}) | {_op(left): _library(right)}
    return found


def _from_table(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same parts as a table: order, deny, choose = {op = library}, layers = {pattern = {op = library}}."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        try:
            if key == "order":
                found["order"] = tuple(_library(name) for name in value)
            elif key == "deny":
                found["deny"] = frozenset(_denied(name) for name in value)
            elif key == "choose":
                found["choose"] = {_op(op): _library(name) for op, name in value.items()}
            elif key == "layers":
                found["layers"] = tuple(
                    (pattern, _op(op), _library(name)) for pattern, row in value.items() for op, name in row.items()
                )
            else:
                raise SettingsError(_unknown("part", key, ("order", "deny", "choose", "layers")))
        except (AttributeError, TypeError):
            raise SettingsError(
                f"ops: {key}={value!r} in {where} has the wrong form; see llm-adapt ops --help."
            ) from None
    return found


def _read_toml(path: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise SettingsError(f"ops={path!r} was asked; reading TOML needs Python 3.11. Write it as text.") from None
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"ops={path!r} was asked; the file cannot be read: {error}.") from None


def _op(name: str) -> str:
    if name != ANY and name not in registry.all_ops():
        raise SettingsError(_unknown("op", name, registry.op_names()))
    return name


def _library(name: str) -> str:
    names = registry.library_names()
    if name not in names:
        raise SettingsError(_unknown("kernel library", name, names))
    return name


def _denied(name: str) -> str:
    library, dot, op = name.partition(".")
    return f"{_library(library)}.{_op(op)}" if dot else _library(library)


def _unknown(what: str, name: Any, names: Iterable[str]) -> str:
    known = list(names)
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"There are: {', '.join(known)}."
    return f"ops: {what} {name!r} was asked; it is unknown. {hint}"
