"""Loans: one module gets a stand-in, nobody else, and a real package that works wins."""

from __future__ import annotations

import builtins
import importlib.util
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from llm_adapt.errors import PatchError
from llm_adapt.patching import Loan, Plan
from tests.patching.toys import applied, load, toys

REASON = "kernels on one path only"


def stand_ins() -> Mapping[str, ModuleType]:
    """A package `fused` with one submodule."""
    package, language = ModuleType("fused"), ModuleType("fused.language")
    package.jit, package.language, language.constexpr = "jit", language, "constexpr"  # type: ignore[attr-defined]
    return {"fused": package, "fused.language": language}


BORROWER = """
    import fused
    import fused.language as tl
    from fused import jit, language
    from fused.language import constexpr
    def later():
        import fused
"""
LOAN = Loan("borrower:fused", stand_ins, REASON)


def test_every_way_of_importing_is_served() -> None:
    """`import a`, `import a.b as c`, `from a import b` and `from a.b import c` reach the stand-ins."""
    with toys({"borrower": BORROWER}):
        plan = applied(LOAN)
        user = load("borrower")
        assert (user.fused.jit, user.jit, user.constexpr) == ("jit", "jit", "constexpr")
        assert user.tl is user.language is user.fused.language
        assert plan.outcomes()[0][1:] == ("applied", f"fused is not installed; {REASON}")
        plan.undo()


def test_nobody_else_sees_the_stand_in() -> None:
    """Modules that the borrower imports, later calls, find_spec and sys.modules know of no such package."""
    sources = {
        "borrower": "import friend\n" + BORROWER.replace("\n    ", "\n") + "\nimport friend2",
        "friend": "try:\n import fused\nexcept ImportError:\n fused = None",
        "friend2": "import importlib.util as util, sys\nspec, listed = util.find_spec('fused'), 'fused' in sys.modules",
    }
    original = builtins.__import__
    with toys(sources):
        plan = applied(LOAN)
        user, friend2 = load("borrower"), load("friend2")
        assert (load("friend").fused, friend2.spec, friend2.listed) == (None, None, False)
        with pytest.raises(ModuleNotFoundError, match="No module named 'fused'"):
            user.later()
        assert (importlib.util.find_spec("fused"), "fused" in sys.modules) == (None, False)
        assert builtins.__import__ is original
        plan.undo()


def test_what_the_stand_in_lacks_is_an_import_error() -> None:
    """A name or submodule that the stand-in does not have is missing at once, not a surprise later."""
    with toys({"borrower": "import fused.runtime", "borrower2": "from fused import autotune"}):
        plan = applied(LOAN, Loan("borrower2:fused", stand_ins, REASON))
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'fused.runtime': it is not part of"):
            load("borrower")
        with pytest.raises(ImportError, match="cannot import name 'autotune'"):
            load("borrower2")
        plan.undo()


def test_a_real_package_that_works_wins() -> None:
    """An installed package is used, the loan is reported as unneeded, and strict mode has no objection."""
    with toys({"borrower": "import fused", "fused": "real = True"}):
        plan = applied(LOAN, strict=True)
        assert load("borrower").fused.real
        assert plan.outcomes()[0][1:] == ("unneeded", "fused is installed")
        plan.undo()


def test_a_stand_in_that_the_user_has_put_there_wins_too() -> None:
    """A module without a spec in sys.modules was put there on purpose."""
    with toys({"borrower": "import fused"}):
        sys.modules["fused"] = mine = ModuleType("fused")
        plan = applied(LOAN)
        assert load("borrower").fused is mine
        plan.undo()
        del sys.modules["fused"]


@pytest.mark.parametrize("failure", ["raise OSError('libcuda.so.1')", "import no_such_dependency", "1 / 0"])
def test_a_package_that_is_installed_and_fails_is_lent_and_told(failure: str) -> None:
    """A package whose import raises does not work; the report says that it is there and how it fails."""
    with toys({"borrower": "import fused\nfrom fused import jit", "fused": failure}):
        plan = applied(LOAN)
        assert load("borrower").jit == "jit"
        status, detail = plan.outcomes()[0][1:]
        assert (status, detail.startswith("fused is installed and fails (")) == ("applied", True)
        plan.undo()


def test_a_bare_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leftovers of an uninstalled package import as an empty namespace; the borrower gets the stand-in."""
    (tmp_path / "fused" / "cache").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with toys({"borrower": "from fused import jit"}):
        plan = applied(LOAN)
        assert load("borrower").jit == "jit"
        plan.undo()
    sys.modules.pop("fused", None)


def test_a_loan_that_nobody_takes_is_told() -> None:
    """A borrower that no longer imports the package makes the row unneeded, not applied."""
    with toys({"borrower": "x = 1"}):
        plan = applied(LOAN)
        load("borrower")
        assert plan.outcomes()[0][1:] == ("unneeded", "borrower does not import fused")
        plan.undo()


def test_a_borrower_that_fails_leaves_no_loan() -> None:
    """When the borrowing import raises, the import system is as before."""
    original = builtins.__import__
    with toys({"borrower": "import fused\nraise OSError('half-way')"}):
        plan = applied(LOAN)
        with pytest.raises(OSError, match="half-way"):
            load("borrower")
        assert (builtins.__import__ is original, "fused" in sys.modules) == (True, False)
        plan.undo()


def test_borrowers_inside_borrowers_and_in_threads() -> None:
    """A borrower that imports another, and two at once in threads, are served and leave nothing."""
    original = builtins.__import__
    sources = {"outer": "import inner\nimport fused", "inner": "import fused", "third": "import time, fused"}
    with toys(sources):
        plan = applied(*(Loan(f"{name}:fused", stand_ins, REASON) for name in sources))
        threads = [threading.Thread(target=load, args=[name]) for name in ("outer", "third")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [load(name).fused.jit for name in sources] == ["jit"] * 3
        assert builtins.__import__ is original
        plan.undo()


def test_an_import_function_that_somebody_puts_over_ours_stays() -> None:
    """A tool that replaces builtins.__import__ meanwhile keeps its place, and everything passes through."""
    original = builtins.__import__
    source = """
        import builtins, fused
        below = builtins.__import__
        builtins.__import__ = lambda *args, **kwargs: below(*args, **kwargs)
        theirs = builtins.__import__
    """
    try:
        with toys({"borrower": source, "second": "import fused"}):
            plan = applied(LOAN, Loan("second:fused", stand_ins, REASON))
            user = load("borrower")
            assert builtins.__import__ is user.theirs
            assert load("second").fused.jit == "jit"
            with pytest.raises(ModuleNotFoundError):
                user.theirs("fused", vars(user))
            plan.undo()
    finally:
        builtins.__import__ = original


def test_only_a_top_level_package_can_be_lent() -> None:
    """A loan of a submodule is refused when the plan is made: its real parent would have to be half replaced."""
    with pytest.raises(PatchError, match="lend a top-level package"):
        Plan([Loan("borrower:fused.language", stand_ins, REASON)])
