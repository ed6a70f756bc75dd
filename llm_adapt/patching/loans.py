"""Loans: stand-ins for missing packages, served to the import statements of one module and to nobody else."""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from llm_adapt.patching.rows import Loan

__all__ = ["Lender"]

Told = Callable[[Loan, bool, str], None]  # the loan, whether it was made, and why or why not


class _Borrower:
    """One module during its import, and what has been decided about each package it may borrow."""

    def __init__(self, loans: Iterable[Loan], told: Told) -> None:
        self.told = told
        self.undecided = {loan.name: loan for loan in loans}
        self.lent: dict[str, Mapping[str, ModuleType]] = {}

    def decide(self, package: str, trial: Callable[[str], Any]) -> None:
        """Lend the package unless a trial import shows that it works; a bare folder of its name does not."""
        loan, reason = self.undecided.pop(package), f"{package} is not installed"
        try:
            spec = getattr(trial(package), "__spec__", None)
            if spec is None or spec.origin is not None:
                return self.told(loan, False, f"{package} is installed")
        except Exception as error:  # noqa: BLE001 - told; whatever a half-installed package raises, it does not work
            if not isinstance(error, ModuleNotFoundError) or error.name != package:
                reason = f"{package} is installed and fails ({type(error).__name__}: {error})"
        self.lent[package] = loan.make()
        self.told(loan, True, f"{reason}; {loan.reason}")

    def lend(self, name: str, from_list: Any) -> ModuleType:
        """What `import a.b` is bound to (a), or what `from a.b import c` looks into (a.b)."""
        package = name.partition(".")[0]
        if name not in self.lent[package]:
            raise ModuleNotFoundError(f"No module named {name!r}: it is not part of the stand-in", name=name)
        return self.lent[package][name if from_list else package]


class Lender:
    """Stands in front of `builtins.__import__` while a borrowing module is executed, and only then."""

    def __init__(self) -> None:
        self._borrowers: dict[str, _Borrower] = {}
        self._lock = threading.Lock()
        self._served = self._import  # one object, to be recognised by identity
        self._real = builtins.__import__
        self._is_installed = False

    @contextlib.contextmanager
    def lending(self, module: str, loans: list[Loan], told: Told) -> Iterator[None]:
        """Serve the loans to `module` inside the block; `told` hears what became of each."""
        if not loans:
            yield
            return
        borrower = _Borrower(loans, told)
        with self._lock:
            self._borrowers[module] = borrower
            if not self._is_installed:
                self._real, builtins.__import__ = builtins.__import__, self._served
                self._is_installed = True
        try:
            yield
        finally:
            with self._lock:
                del self._borrowers[module]
                # Where somebody has put an __import__ over ours, ours stays below it and passes everything on.
                if not self._borrowers and builtins.__import__ is self._served:
                    builtins.__import__ = self._real
                    self._is_installed = False
        for loan in borrower.undecided.values():
            told(loan, False, f"{module} does not import {loan.name}")

    def _import(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> ModuleType:
        borrower = self._borrowers.get(globals.get("__name__")) if globals and not level else None
        if borrower is not None:
            package = name.partition(".")[0]
            if package in borrower.undecided:
                borrower.decide(package, lambda top: self._real(top, globals))
            if package in borrower.lent:
                return borrower.lend(name, fromlist)
        return self._real(name, globals, locals, fromlist, level)
