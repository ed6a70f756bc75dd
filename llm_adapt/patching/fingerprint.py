"""Fingerprints: a short hash of the signature and body of a definition, from its source text.

The same text gives the same value in every Python version, whatever its comments, docstrings, line breaks
and position, and no import is needed: a wheel of a version that is not installed can be checked as well.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
from pathlib import Path
from typing import Any

__all__ = ["find_definition", "fingerprint_object", "fingerprint_source"]

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def fingerprint_source(source: str, qualname: str) -> str | None:
    """Fingerprint of `qualname` in a module's source text; None when the text does not define it."""
    return _of_tree(ast.parse(source), qualname)


def fingerprint_object(original: Any) -> str | None:
    """Fingerprint of an imported function, property or class; None when it has no Python source to be read.

    Decorators stand in the source, so they count; what was put around the definition at run time does not.
    """
    if isinstance(original, property):
        original = original.fget
    original = inspect.unwrap(original) if callable(original) else original
    qualname = getattr(original, "__qualname__", "")
    try:
        path = inspect.getsourcefile(original)
    except TypeError:  # C code
        return None
    if path is None or "<locals>" in qualname:
        return None
    if Path(path).is_file():
        return _of_tree(_parsed(path, Path(path).stat().st_mtime_ns), qualname)
    names = getattr(inspect.getmodule(original), "__dict__", None)
    source = "".join(linecache.getlines(path, names))  # through the module's own loader: a zip file
    return fingerprint_source(source, qualname)


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
    fields = {name: value for name, value in ast.iter_fields(node) if name not in ("type_comment", "kind", "ctx")}
    if isinstance(node, Definition) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 ends a nested format with an empty text
        fields["values"] = [item for item in node.values if getattr(item, "value", None) != ""]
    parts = [f"{name}={_value(value)}" for name, value in fields.items() if value is not None and value != []]
    return f"{type(node).__name__}({','.join(parts)})"


def _value(value: Any) -> str:
    if isinstance(value, ast.AST):
        return _canonical(value)
    if isinstance(value, list):
        return "[" + ",".join(_value(item) for item in value) + "]"
    return repr(value)
