"""Surveys of one plan: which modules they cover, what they found there, and what they stumbled over."""

from __future__ import annotations

import fnmatch
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Literal

from llm_adapt.patching.rows import Entry, Patch, Survey

__all__ = ["Surveys"]


class Surveys:
    """Every module of their families is looked at once, or again when it has been imported anew."""

    def __init__(self, surveys: Iterable[Survey]) -> None:
        self.surveys = list(surveys)
        patterns = {fnmatch.translate(pattern) for survey in self.surveys for pattern in survey.modules}
        # One for all, since each import of the process asks; (?!) matches nothing.
        self._pattern = re.compile("|".join(sorted(patterns)) or "(?!)")
        self._seen: set[str] = set()
        self._found: dict[Survey, int] = dict.fromkeys(self.surveys, 0)
        self._problems: list[tuple[Survey, str]] = []
        self._lock = threading.Lock()

    def cover(self, module: str) -> bool:
        """Whether any survey wants to see a module of that name."""
        return self._pattern.match(module) is not None

    def look(self, module: str, is_new: bool) -> tuple[list[Patch | Entry], list[str]]:
        """The rows found in a module that has been imported, and a line for each survey that failed there.

        Args:
            is_new: its body has just run, for the first time or again; else it is looked at unless it has been.
        """
        now = sys.modules.get(module)
        if now is None or not self.cover(module):
            return [], []
        with self._lock:  # two threads may come by the same module: one that patches, and one that imports
            if module in self._seen and not is_new:
                return [], []
            self._seen.add(module)
        rows: list[Patch | Entry] = []
        problems: list[str] = []
        for survey in self.surveys:
            if not survey.covers(module):
                continue
            try:
                found = list(survey.find(now))
            except Exception as error:  # noqa: BLE001 - foreign code is tried out: said, and the module is left alone
                problem = f"{module} was left alone: {type(error).__name__}: {error}"
                self._problems.append((survey, problem))
                problems.append(problem)
            else:
                self._found[survey] += len(found)
                rows += found
        return rows, problems

    def outcomes(self) -> Iterator[tuple[Survey, Literal["applied", "waiting", "skipped"], str]]:
        """What has become of each survey, and a line for each module that it failed in."""
        for survey in self.surveys:
            seen = sum(survey.covers(module) for module in self._seen)
            if seen:
                yield survey, "applied", f"{self._found[survey]} names recognised in {seen} modules: {survey.reason}"
            else:
                yield survey, "waiting", f"no such module is imported yet: {survey.reason}"
        for survey, problem in self._problems:
            yield survey, "skipped", problem
