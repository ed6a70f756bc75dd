"""Fingerprints: equal for the same definition wherever and however it is written, different for another."""

from __future__ import annotations

import functools
import os
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.errors import PatchError
from llm_adapt.patching import Patch
from llm_adapt.patching.fingerprint import fingerprint_object, fingerprint_source
from tests.patching.toys import applied, load, wrap

SOURCE = '''
import functools

class Layer:
    """A layer."""

    @functools.lru_cache(maxsize=None)
    def forward(self, x: int, *rest, scale: float = 1.0, **options) -> str:
        """Do it."""
        with open(x) as f, open("y"):
            text = f"{x!r:>{scale}}" "tail"
        return text if x else None  # never

    @property
    def width(self):
        return 10

    @width.setter
    def width(self, value):
        self._width = value

if True:
    def norm(x, eps=1e-6):
        return x / eps
else:
    def other(): ...

async def fetch(): await norm(1)
'''


def variant(change: tuple[str, str]) -> str:
    """The source with one text replaced by another."""
    old, new = change
    assert old in SOURCE
    return SOURCE.replace(old, new)


# -- the value ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qualname", "expected"),
    [("Layer.forward", "f43377b12684"), ("Layer", "de1b509bfaa2"), ("norm", "5ee79b6602a7"), ("fetch", "7378d8dab14e")],
)
def test_the_value_is_the_same_in_every_python(qualname: str, expected: str) -> None:
    """Fingerprints are written into tables once; every interpreter must find the same ones."""
    assert fingerprint_source(SOURCE, qualname) == expected


@pytest.mark.parametrize("qualname", ["nothing", "Layer.nothing", "norm.x", "f"])
def test_what_is_not_defined_has_none(qualname: str) -> None:
    """A name that the text does not define, or does not define as a function or class, has no fingerprint."""
    assert fingerprint_source(SOURCE + "f = norm", qualname) is None


@pytest.mark.parametrize(
    "change",
    [
        ("        return x / eps", "        # a comment\n\n        return (x\n            / eps)"),
        ('"""Do it."""', '"""Do it better."""'),
        ('        """Do it."""\n', ""),
        ("import functools\n", "import functools, os\n\n\n\n"),
        ('"tail"', "'tail'"),
        ("1e-6", "0.000001"),
        ("if True:", "try:\n    pass\nfinally:\n    pass\nif True:"),
    ],
)
def test_looks_do_not_count(change: tuple[str, str]) -> None:
    """Comments, docstrings, line breaks, quotes, positions and neighbours leave every fingerprint as it is."""
    for qualname in ("Layer.forward", "norm"):
        assert fingerprint_source(variant(change), qualname) == fingerprint_source(SOURCE, qualname)


@pytest.mark.parametrize(
    "change",
    [
        ("eps=1e-6", "eps=1e-5"),
        ("x / eps", "x * eps"),
        ("def norm(x, eps=1e-6)", "def norm(x, epsilon=1e-6)"),
        ("def norm(x, eps=1e-6)", "def norm(x, eps=1e-6, out=None)"),
        ("def norm(x, eps=1e-6)", "async def norm(x, eps=1e-6)"),
        ("def norm(x, eps=1e-6)", "def norm(x: int, eps=1e-6)"),
        ("    def norm(", "    @functools.lru_cache\n    def norm("),
        ("return x / eps", "return None"),
        ("        return x / eps", "        x / eps\n        return"),
    ],
)
def test_what_it_does_counts(change: tuple[str, str]) -> None:
    """Another default, operator, parameter, annotation, decorator or result is another definition."""
    assert fingerprint_source(variant(change), "norm") != fingerprint_source(SOURCE, "norm")


@given(st.text("abc \n#", max_size=20), st.integers(0, 3), st.booleans())
def test_comments_and_indentation_never_count(comment: str, depth: int, docstring: bool) -> None:
    """However deep in blocks, and whatever is written around it, a function has one fingerprint."""
    noise = "".join(f"# {line}\n" for line in comment.splitlines())
    told = "    'What it does.'\n" if docstring else ""
    text = f"{noise}def f(a, b=2):\n{told}{textwrap.indent(noise, '    ')}    return a + b\n"
    for _ in range(depth):
        text = "if True:\n" + textwrap.indent(text, "    ")
    assert fingerprint_source(text, "f") == fingerprint_source("def f(a, b=2): return a + b", "f")


def test_the_last_of_several_definitions_counts() -> None:
    """As in Python, a later definition of a name is the one that is there."""
    text = "def f(): return 1\nif True:\n    def f(): return 2\n"
    assert fingerprint_source(text, "f") == fingerprint_source("def f(): return 2", "f")


# -- of imported objects -----------------------------------------------------------------------------------


@pytest.fixture
def kit(on_disk: Path) -> Any:
    """The source as an imported module."""
    (on_disk / "fingered.py").write_text(SOURCE)
    return load("fingered")


def test_an_object_has_the_fingerprint_of_its_source(kit: Any) -> None:
    """Functions, methods, decorated methods, properties and classes are found in their module's text."""
    found = {
        "norm": fingerprint_object(kit.norm),
        "fetch": fingerprint_object(kit.fetch),
        "Layer": fingerprint_object(kit.Layer),
        "Layer.forward": fingerprint_object(kit.Layer.forward),
        "Layer.width": fingerprint_object(vars(kit.Layer)["width"]),
    }
    assert found == {name: fingerprint_source(SOURCE, name) for name in found}


def test_what_has_no_source_has_none(kit: Any) -> None:
    """C code, local functions, partials and plain values have no fingerprint."""
    local = lambda: None  # noqa: E731
    assert [fingerprint_object(item) for item in (len, local, functools.partial(kit.norm), 3, None)] == [None] * 5


def test_an_edited_file_is_read_anew(kit: Any) -> None:
    """The text is cached for as long as the file does not change."""
    path = Path(kit.__file__)
    first = fingerprint_object(kit.norm)
    path.write_text(SOURCE.replace("x / eps", "x * eps"))
    os.utime(path, ns=(1, 1))
    assert fingerprint_object(kit.norm) not in (first, None)


def test_a_module_in_a_zip_file_has_one(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text comes through the module's own loader where there is no file."""
    with zipfile.ZipFile(on_disk / "kit.zip", "w") as archive:
        archive.writestr("fingered_zip.py", SOURCE)
    monkeypatch.syspath_prepend(on_disk / "kit.zip")
    assert fingerprint_object(load("fingered_zip").norm) == fingerprint_source(SOURCE, "norm")


# -- as a guard --------------------------------------------------------------------------------------------

KNOWN = {"1.0": "000000000000"}


def test_a_known_fingerprint_lets_the_row_through(kit: Any) -> None:
    """The row is applied when any of its versions fits."""
    fits = {**KNOWN, "1.1": str(fingerprint_source(SOURCE, "norm"))}
    plan = applied(wrap("fingered:norm", lambda old: lambda x: "mine", fingerprints=fits, on_mismatch="refuse"))
    assert kit.norm(1) == "mine"
    plan.undo()


def test_an_unknown_fingerprint_is_skipped_and_told(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A changed original is left alone, with found and known values in the report and the log."""
    plan = applied(wrap("fingered:norm", fingerprints=KNOWN))
    found = fingerprint_source(SOURCE, "norm")
    assert plan.outcomes()[0].status == "skipped"
    assert f"its source has changed (fingerprint {found}; known 1.0: 000000000000)" in plan.outcomes()[0].detail
    assert "its source has changed" in caplog.text
    assert kit.norm(1) == 1e6
    plan.undo()


@pytest.mark.parametrize("options", [{"on_mismatch": "refuse"}, {"strict": True}])
def test_an_unknown_fingerprint_is_refused_where_that_is_asked(kit: Any, options: dict[str, Any]) -> None:
    """on_mismatch="refuse", or strict mode, raises before anything is written."""
    strict = options.pop("strict", False)
    before = dict(vars(kit))
    row = Patch("fingered:norm", None, "why", fingerprints=KNOWN, **options)
    with pytest.raises(PatchError, match="fingered:norm: its source has changed"):
        applied(wrap("fingered:fetch"), row, strict=strict)
    assert vars(kit) == before


def test_a_row_without_fingerprints_checks_nothing(kit: Any) -> None:
    """An original without any source can still be patched by a row that asks for no fingerprint."""
    plan = applied(Patch("fingered:functools", None, "why"))
    plan.undo()
