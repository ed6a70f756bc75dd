"""Fingerprints: a short hash of the signature and body of a definition, from its source text.

The same text gives the same value in every Python version, whatever its comments, docstrings, line breaks
and position, and no import is needed: a wheel of a version that is not installed can be checked as well.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

__all__ = ["find_definition", "fingerprint_object", "fingerprint_source"]

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def fingerprint_source(source: str, qualname: str) -> str | None:
    """Fingerprint of `qualname` in a module's source text; None when the text does not define it."""
    return _of_tree(ast.parse(source), qualname)


def fingerprint_object(original: Any) -> str | None:
    """Fingerprint of an imported function or class; None when it has no Python source (C code, closures)."""
    original = inspect.unwrap(original) if callable(original) else original
    try:
        path = inspect.getsourcefile(original)
    except TypeError:
        return None
    qualname = getattr(original, "__qualname__", "")
    if path is None or "<locals>" in qualname or not Path(path).is_file():
        return None
    return _of_tree(_parsed(path, Path(path).stat().st_mtime_ns), qualname)


@functools.lru_cache(maxsize=32)
def _parsed(path: str, mtime_ns: int) -> ast.Module:
    del mtime_ns  # part of the cache key only: an edited file is parsed anew
    return ast.parse(Path(path).read_bytes())


def _of_tree(tree: ast.Module, qualname: str) -> str | None:
    node = find_definition(tree, qualname)
    return None if node is None else hashlib.sha256(_canonical(node).encode()).hexdigest()[:12]


def find_definition(tree: ast.Module, qualname: str) -> Definition | None:
    """Find a function or class by qualified name, also inside if/try blocks; the last definition wins."""
    scope: ast.AST = tree
    for part in qualname.split("."):
        found = None
        for child in _statements(scope):
            if isinstance(child, Definition) and child.name == part:
                found = child
        if found is None:
            return None
        scope = found
    return scope if isinstance(scope, Definition) else None


def _statements(scope: ast.AST) -> list[ast.stmt]:
    """Statements of a scope, with the branches of its if, try and with blocks."""
    flat: list[ast.stmt] = []
    stack: list[ast.AST] = list(reversed(getattr(scope, "body", [])))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.stmt):
            flat.append(node)
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            for name in ("finalbody", "orelse", "handlers", "body"):
                stack.extend(reversed(getattr(node, name, [])))
    return flat


def _canonical(node: ast.AST) -> str:
    """Text of a tree without positions, docstrings and empty fields, which differ between Python versions."""
    parts = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, Definition) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]
        if value is None or value == [] or name in ("type_comment", "kind", "ctx"):
            continue
        parts.append(f"{name}={_value(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _value(value: Any) -> str:
    if isinstance(value, ast.AST):
        return _canonical(value)
    if isinstance(value, list):
        return "[" + ",".join(_value(item) for item in value) + "]"
    return repr(value)
