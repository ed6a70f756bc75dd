"""Rebinding: copies that were taken before the patch, and what cannot be rebound."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from llm_adapt.patching import Patch, Plan
from tests.patching.toys import applied, load, louder, toys, wrap

KIT = {
    "kit": """
        def norm(x): return ('norm', x)
        def scale(x): return ('scale', x)
        class Layer:
            def forward(self): return 'forward'
    """
}
LOUD, QUIET = ("loud", ("norm", 1)), ("norm", 1)

# One way of keeping a copy each: source of the user's module, and how its copy is called.
COPIES = {
    "from-import": ("from kit import norm", "norm(1)"),
    "from-import with another name": ("from kit import norm as n", "n(1)"),
    "alias of a module attribute": ("import kit\nalias = kit.norm", "alias(1)"),
    "default argument": ("from kit import norm\ndef call(x, f=norm): return f(x)", "call(1)"),
    "keyword-only default": ("from kit import norm\ndef call(x, *, f=norm): return f(x)", "call(1)"),
    "default of a method": ("from kit import norm\nclass A:\n def m(self, x, f=norm): return f(x)", "A().m(1)"),
    "default of a lambda in a dict": ("from kit import norm\nd = {'k': lambda x, f=norm: f(x)}", "d['k'](1)"),
    "partial": ("import functools, kit\np = functools.partial(kit.norm)", "p(1)"),
    "partial argument": ("import functools, kit\np = functools.partial(lambda f, x: f(x), kit.norm)", "p(1)"),
    "partial keyword": ("import functools, kit\np = functools.partial(lambda x, f: f(x), f=kit.norm)", "p(1)"),
    "partial of a partial in a list": (
        "import functools, kit\np = [functools.partial(functools.partial(kit.norm))]",
        "p[0](1)",
    ),
    "partialmethod": (
        "import functools, kit\ndef two(self, f, x): return f(x)\n"
        "class A:\n m = functools.partialmethod(two, f=kit.norm)",
        "A().m(x=1)",
    ),
    "class attribute": ("from kit import norm\nclass A:\n impl = staticmethod(norm)", "A.impl(1)"),
    "class attribute, bare": ("import kit\nclass A:\n impl = kit.norm", "A.impl(1)"),
    "class attribute of an inner class": ("import kit\nclass A:\n class B:\n  impl = kit.norm", "A.B.impl(1)"),
    "dict": ("import kit\nd = {'k': kit.norm}", "d['k'](1)"),
    "dict of a subclass": ("import kit, collections\nd = collections.OrderedDict(k=kit.norm)", "d['k'](1)"),
    "key of a dict": ("import kit\nd = {1: 2, kit.norm: 3, 4: 5}", "[*d][1](1)"),
    "key and value": ("import kit\nd = {kit.norm: {kit.norm: kit.norm}}", "[*[*d.values()][0].values()][0](1)"),
    "key of an OrderedDict": (
        "import kit, collections\nd = collections.OrderedDict([(kit.norm, 1), (2, 3)])",
        "[*d][0](1)",
    ),
    "list": ("import kit\nd = [0, kit.norm]", "d[1](1)"),
    "deque": ("import kit, collections\nd = collections.deque([kit.norm])", "d[0](1)"),
    "set": ("import kit\nd = {kit.norm}", "[*d][0](1)"),
    "frozenset": ("import kit\nd = frozenset([kit.norm])", "[*d][0](1)"),
    "tuple": ("import kit\nd = (0, kit.norm)", "d[1](1)"),
    "tuple in a tuple": ("import kit\nd = (0, (kit.norm, 1))", "d[1][0](1)"),
    "tuple in a dict in a list": ("import kit\nd = [{'k': ('gelu', kit.norm)}]", "d[0]['k'][1](1)"),
    "closure": ("from kit import norm\ndef make(f):\n return lambda x: f(x)\ncall = make(norm)", "call(1)"),
    "dataclass default": (
        "import dataclasses, kit\nfrom typing import Any\n@dataclasses.dataclass\nclass A:\n f: Any = kit.norm",
        "A().f(1) if A.__dataclass_fields__['f'].default(1) == A().f(1) else 'mixed'",
    ),
    "behind a decorator of the standard library": (
        "import functools, kit\n@functools.lru_cache\ndef call(x, f=kit.norm): return f(x)",
        "(call.cache_clear(), call(1))[1]",
    ),
    "behind a decorator of torch": (
        "import torch, kit\n@torch.no_grad()\ndef call(x, f=kit.norm): return f(x)",
        "call(1)",
    ),
}


@pytest.mark.parametrize(("source", "call"), COPIES.values(), ids=COPIES)
def test_a_copy_follows_the_patch_and_comes_back(source: str, call: str) -> None:
    """A copy that was taken before the patch calls the replacement, and after undo the original."""
    with toys({**KIT, "user": source}):
        user = load("user")
        before = {name: id(value) for name, value in vars(user).items()}
        plan = applied(wrap("kit:norm"))
        assert eval(call, vars(user)) == LOUD
        assert plan.outcomes()[0].status == "applied", plan.outcomes()
        assert plan.undo() == []
        assert eval(call, vars(user)) == QUIET
        assert {name: id(value) for name, value in vars(user).items()} == before


@pytest.mark.parametrize(("source", "call"), COPIES.values(), ids=COPIES)
def test_a_copy_taken_while_patched_goes_back(source: str, call: str) -> None:
    """A copy that was taken after the patch holds the original when the patch is undone."""
    with toys({**KIT, "user": source}):
        plan = applied(wrap("kit:norm"))
        user = load("user")
        assert eval(call, vars(user)) == LOUD
        assert plan.undo() == []
        assert eval(call, vars(user)) == QUIET


def test_containers_and_partials_keep_their_identity() -> None:
    """What others hold by reference is changed in place, and every part of it comes back as the same object."""
    source = "import functools, kit\nd, l, p = {'k': kit.norm}, [kit.norm], functools.partial(kit.norm, 1)\nt = (p, d)"
    with toys({**KIT, "user": source}):
        user = load("user")
        before = {name: id(value) for name, value in vars(user).items()}
        plan = applied(wrap("kit:norm"))
        assert {name: id(value) for name, value in vars(user).items()} == before
        assert user.t[0]() == LOUD
        plan.undo()
        assert (user.p(), user.l, user.d) == (QUIET, [load("kit").norm], {"k": load("kit").norm})


def test_a_tuple_comes_back_as_the_same_object() -> None:
    """A tuple has to be built anew; undo puts the first one back, not an equal one."""
    with toys({**KIT, "user": "import kit\nt = (kit.norm, 1)\ndef f(a, b=kit.norm): pass"}):
        user = load("user")
        before = (id(user.t), id(user.f.__defaults__))
        plan = applied(wrap("kit:norm"))
        assert (id(user.t), id(user.f.__defaults__)) != before
        plan.undo()
        assert (id(user.t), id(user.f.__defaults__)) == before


def test_a_user_who_changed_a_copy_since_keeps_his_change() -> None:
    """Undo does not touch a copy that holds something else by now, and needs no words for it."""
    with toys({**KIT, "user": "from kit import norm, scale\nbox = [norm]"}):
        user, plan = load("user"), applied(wrap("kit:norm"))
        user.norm, user.box[:] = user.scale, [user.scale]
        assert plan.undo() == []
        assert (user.norm, user.box) == (user.scale, [user.scale])


def test_a_replaced_class_keeps_its_own_super() -> None:
    """super() in a class that is replaced looks at the class that stands in the source."""
    source = "class Base:\n def f(self): return 'base'\nclass Heir(Base):\n def f(self): return super().f()\n"
    source += "old = Heir()"
    with toys({"kit": source, "user": "from kit import Heir"}):
        user, kit = load("user"), load("kit")
        plan = applied(Patch("kit:Heir", type("Heir", (kit.Heir,), {}), "why"))
        assert (user.Heir().f(), kit.old.f()) == ("base", "base")
        plan.undo()


def test_a_wrapper_keeps_the_original_that_it_calls() -> None:
    """The replacement closes over the original, and that closure is not rebound, wherever the wrapper is made."""
    source = "def loud(f):\n def wrapper(x): return ('loud', f(x))\n return wrapper"
    with toys({**KIT, "thirdparty": source, "user": "from kit import norm\nkeep = [norm]"}):
        user = load("user")
        plan = applied(wrap("kit:norm", load("thirdparty").loud))
        assert (user.norm(1), user.keep[0](1)) == (LOUD, LOUD)
        plan.undo()


# -- what must not be rebound ------------------------------------------------------------------------------


def test_an_inherited_method_is_not_taken_from_its_base() -> None:
    """A row on a class that inherits its method leaves copies of the base's method alone."""
    source = "class Base:\n def f(self): return 'base'\nclass Heir(Base): pass"
    with toys({"kit": source, "user": "from kit import Base\nf = Base.f"}):
        user, kit = load("user"), load("kit")
        plan = applied(wrap("kit:Heir.f"))
        assert (user.f(None), kit.Base().f(), kit.Heir().f()) == ("base", "base", ("loud", "base"))
        plan.undo()


def test_an_alias_of_another_packages_function_is_known_by_its_name_only() -> None:
    """`fuser = other.compile`: the user's own copies of compile stay, those called fuser follow."""
    with toys(
        {
            "other": "def compile(f): return ('compiled', f)",
            "kit": "import other\nfuser = other.compile",
            "kit2": "from kit import fuser",
            "user": "from other import compile\nbox = [compile]",
        }
    ):
        user, friend = load("user"), load("kit2")
        plan = applied(Patch("kit:fuser", lambda f: f, "why"))
        assert (friend.fuser(1), user.compile(1), user.box[0](1)) == (1, ("compiled", 1), ("compiled", 1))
        plan.undo()
        assert friend.fuser is user.compile


def test_a_seam_in_one_module_is_changed_in_that_module() -> None:
    """A row on `kit:sqrt`, imported from another package under its own name, changes nobody else's sqrt."""
    with toys({"kit": "from math import sqrt", "user": "from math import sqrt"}):
        user, kit = load("user"), load("kit")
        plan = applied(Patch("kit:sqrt", lambda x: "mine", "why"))
        assert (kit.sqrt(4), user.sqrt(4)) == ("mine", 2.0)
        plan.undo()


def test_values_without_identity_are_not_rebound() -> None:
    """True, None, numbers and strings are everybody's: only the target changes."""
    with toys({"kit": "flag = True", "user": "flag = True\nbox = [True]"}):
        user, kit = load("user"), load("kit")
        plan = applied(Patch("kit:flag", False, "why"))
        assert (kit.flag, user.flag, user.box) == (False, True, [True])
        plan.undo()


def test_rebind_false_changes_the_target_alone() -> None:
    """A row that asks for no rebinding leaves every copy as it is."""
    with toys({**KIT, "user": "from kit import norm"}):
        user = load("user")
        plan = applied(wrap("kit:norm", rebind=False))
        assert (load("kit").norm(1), user.norm(1)) == (LOUD, QUIET)
        plan.undo()


class Alarm(types.ModuleType):
    """A lazy module: any attribute that is asked for wakes it."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"woken by {name}")


class Proxy:
    """A lazy object: it pretends to be of another class, and finding out which wakes it."""

    @property
    def __class__(self) -> Any:
        raise AssertionError("woken")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"woken by {name}")


@pytest.fixture
def asleep() -> Iterator[None]:
    """A lazy module and a lazy object in sys.modules, and a module that holds one."""
    sys.modules["asleep"], sys.modules["asleep_too"] = Alarm("asleep"), Proxy()  # type: ignore[assignment]
    holder = types.ModuleType("holder")
    holder.lazy, holder.box = Proxy(), [Proxy(), {"k": Proxy()}]  # type: ignore[attr-defined]
    sys.modules["holder"] = holder
    yield
    for name in ("asleep", "asleep_too", "holder"):
        del sys.modules[name]


@pytest.mark.usefixtures("asleep")
def test_nothing_lazy_is_woken() -> None:
    """Lazy modules, proxies and whatever answers __getattr__ sleep through patch and undo."""
    with toys({**KIT, "user": "from kit import norm\ndef __getattr__(name): raise RuntimeError(name)"}):
        user = load("user")
        plan = applied(wrap("kit:norm"))
        assert user.norm(1) == LOUD
        plan.undo()


def test_a_dict_that_makes_what_is_asked_of_it_is_not_asked() -> None:
    """A subclass may instantiate what it keeps when it is looked up: the search reads past that."""
    source = """
        import collections, kit
        class Maker(collections.OrderedDict):
            def __getitem__(self, name): raise RuntimeError("it was asked")
        made = Maker(norm=kit.norm)
    """
    with toys({**KIT, "user": source}):
        user = load("user")
        plan = applied(wrap("kit:norm"))
        assert dict.__getitem__(user.made, "norm")(1) == LOUD
        plan.undo()


def test_a_module_of_lazy_loader_sleeps_on() -> None:
    """A module that importlib.util.LazyLoader has put to sleep is not executed by the search for copies."""
    with toys({**KIT, "sleeper": "raise RuntimeError('woken')", "user": "from kit import norm"}) as finder:
        spec = finder.find_spec("sleeper")
        assert spec is not None
        spec.loader = importlib.util.LazyLoader(finder)
        module = importlib.util.module_from_spec(spec)
        sys.modules["sleeper"] = module
        spec.loader.exec_module(module)
        load("user")
        plan = applied(wrap("kit:norm"))
        plan.undo()
        assert "sleeper" not in finder.executed


# -- what cannot be rebound is reported --------------------------------------------------------------------

STUCK = {
    "base class": ("from kit import Layer\nclass Mine(Layer): pass", "Layer", "user.Mine is derived from it"),
    "instance": ("import kit\nx = kit.Layer()", "Layer", "instances of it were made before the patch"),
    "key of an unknown kind of dict": (
        "import kit\nclass D(dict): pass\nd = D({kit.norm: 1})",
        "norm",
        "user has it as a key of a D",
    ),
    "lru_cache": (
        "import functools, kit\nf = functools.lru_cache(kit.norm)",
        "norm",
        "user has it wrapped by functools.lru_cache",
    ),
    "attribute of an instance": (
        "import kit\nclass A: pass\na = A()\na.hidden, a.__dict__ = 1, {'act': kit.norm}",
        "norm",
        "'act' of an object of type user.A is it",
    ),
    "closure of a function that no module has": (
        "from kit import norm\ndef make(f):\n return lambda x: f(x)\nclass A: pass\na = A()\na.call = make(norm)",
        "norm",
        "user.make.<locals>.<lambda> closes over it",
    ),
}


@pytest.mark.parametrize(("source", "name", "told"), STUCK.values(), ids=STUCK)
def test_what_cannot_be_rebound_is_told(source: str, name: str, told: str, caplog: pytest.LogCaptureFixture) -> None:
    """A copy out of reach makes the row's outcome `stale`, names the place, and is logged as a warning."""
    with toys({**KIT, "user": source}):
        user = load("user")
        replacement = type("Layer", (), {}) if name == "Layer" else louder(load("kit").norm)
        plan = applied(Patch(f"kit:{name}", replacement, "why"))
        (outcome,) = plan.outcomes()
        assert (outcome.status, told in outcome.detail, told in caplog.text) == ("stale", True, True), outcome
        plan.undo()
        assert user


@pytest.mark.parametrize(("source", "name", "told"), STUCK.values(), ids=STUCK)
def test_strict_refuses_what_cannot_be_rebound(source: str, name: str, told: str) -> None:
    """With strict=True such a copy is an error, and nothing stays patched."""
    with toys({**KIT, "user": source}):
        user, kit = load("user"), load("kit")
        before = dict(vars(kit))
        with pytest.raises(Exception, match=r"these copies keep the original.*strict mode"):
            applied(Patch(f"kit:{name}", type("Layer", (), {}), "why"), strict=True)
        assert vars(kit) == before
        assert user


def test_a_clean_patch_reports_no_copies() -> None:
    """Replacements, their closures and the plan's own memory are not mistaken for copies that stayed."""
    source = "import functools\nfrom kit import norm, Layer\nbox, p = [norm, (norm,)], functools.partial(norm)"
    with toys({**KIT, "user": source}):
        user = load("user")
        plan = applied(wrap("kit:norm"), wrap("kit:scale"), wrap("kit:Layer.forward"), wrap("user:Layer"))
        assert [outcome.status for outcome in plan.outcomes()] == ["applied"] * 4
        plan.undo()
        assert user


def test_importing_after_the_patch_needs_no_search() -> None:
    """Rows that wait for their module ask the garbage collector nothing: nobody can have a copy yet."""
    with toys({**KIT, "user": "import kit\nclass A: pass\na = A()\na.x = kit.norm"}):
        plan = Plan([wrap("kit:norm")])
        plan.apply()
        user = load("user")
        assert user.a.x(1) == LOUD
        assert plan.outcomes()[0].status == "applied"
        plan.undo()
