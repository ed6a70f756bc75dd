"""What the commands print: tables, headings, errors; by rich on a terminal, as aligned text elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from llm_adapt.errors import LlmAdaptError

__all__ = ["error", "heading", "paragraph", "table"]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], file: TextIO | None = None) -> None:
    """Print a titled table; every cell is shown as its text."""
    file = sys.stdout if file is None else file
    cells = [[str(cell) for cell in row] for row in rows]
    console = _console(file)
    if console is None:
        print("\n".join((title, *_aligned([list(columns), *cells]))), file=file)
        return
    text = importlib.import_module("rich.text").Text  # not markup: a "[0-9]*" in a cell must survive
    shown = importlib.import_module("rich.table").Table(*columns, title=title, title_justify="left", box=None)
    for row in cells:
        shown.add_row(*map(text, row))
    console.print(shown)


def heading(text: str, file: TextIO | None = None) -> None:
    """Print one line that starts a part of the output."""
    file = sys.stdout if file is None else file
    console = _console(file)
    if console is None:
        print(text, file=file)
    else:
        console.print(text, style="bold", markup=False, highlight=False)


def paragraph(text: str, indent: int = 0, file: TextIO | None = None) -> None:
    """Print text, every line of it indented by so many spaces."""
    file = sys.stdout if file is None else file
    for line in text.splitlines():
        print(" " * indent + line, file=file)


def error(failure: LlmAdaptError, file: TextIO | None = None) -> None:
    """Print an error of ours to standard error: its kind and its message, no stack trace."""
    file = sys.stderr if file is None else file
    text = f"llm-adapt: {type(failure).__name__}: {failure}"
    console = _console(file)
    if console is None:
        print(text, file=file)
    else:
        console.print(text, style="red", markup=False, highlight=False)


def _console(file: TextIO) -> Any:
    """Return a rich console for a terminal, else None. rich itself honours NO_COLOR."""
    if not file.isatty() or importlib.util.find_spec("rich") is None:
        return None
    return importlib.import_module("rich.console").Console(file=file)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [f"  {line}".rstrip() for line in padded]
