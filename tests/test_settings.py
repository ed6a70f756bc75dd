"""Settings: one table, variables and arguments alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.errors import SettingsError
from llm_adapt.settings import SETTINGS, Settings, read_environment, resolve

TEXTS = {
    "device": "npu",
    "simulate": "npu:Ascend910B3",
    "cache": "built",
    "strict": "1",
    "cpu_devices": "8",
    "out": "runs/a",
    "ops": "-apex",
    "proof": "sample:9",
}
VALUES = {
    "device": "npu",
    "simulate": "npu:Ascend910B3",
    "cache": "built",
    "strict": True,
    "cpu_devices": 8,
    "out": "runs/a",
    "ops": "-apex",
    "proof": "sample:9",
}


def test_the_table_has_every_field_and_nothing_else() -> None:
    """Each field of Settings has its row, its variable, what it accepts, and what it means."""
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(Settings)]
    for name, row in SETTINGS.items():
        assert row.variable == "LLM_ADAPT_" + name.upper()
        assert row.accepts
        assert row.meaning


def test_an_empty_environment_gives_the_defaults() -> None:
    """Without variables and arguments every setting has its default."""
    assert resolve({}) == Settings()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_variable_and_an_argument_mean_the_same(name: str) -> None:
    """LLM_ADAPT_X=text and patch(x=value) give the same settings."""
    from_variable = resolve({SETTINGS[name].variable: TEXTS[name]})
    assert from_variable == resolve({}, **{name: VALUES[name]})
    assert getattr(from_variable, name) == VALUES[name]


def test_the_argument_wins_over_the_variable() -> None:
    """An argument is nearer to the user than a variable; None stands for no argument."""
    environ = {"LLM_ADAPT_DEVICE": "npu", "LLM_ADAPT_STRICT": "1"}
    assert resolve(environ, device="cpu", strict=False) == Settings(device="cpu", strict=False)
    assert resolve(environ, device=None, strict=None) == Settings(device="npu", strict=True)


@pytest.mark.parametrize(("variable", "near"), [("LLM_ADAPT_DEVCE", "LLM_ADAPT_DEVICE"), ("LLM_ADAPT_ZZZ", None)])
def test_an_unknown_variable_is_an_error_with_a_hint(variable: str, near: str | None) -> None:
    """A misspelt variable is refused, with the nearest name where there is one and all known names."""
    with pytest.raises(SettingsError, match=f"Unknown environment variable {variable}") as error:
        read_environment({variable: "1"})
    assert ("Did you mean" in str(error.value)) == (near is not None)
    assert f"Did you mean {near}?" in str(error.value) or near is None
    assert "LLM_ADAPT_CPU_DEVICES, LLM_ADAPT_DEVICE" in str(error.value)


def test_an_unknown_argument_is_an_error_with_a_hint() -> None:
    """A misspelt argument is refused in the same words."""
    with pytest.raises(SettingsError, match=r"Unknown patch\(\) argument 'devise'. Did you mean device\?"):
        resolve({}, devise="cpu")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("device", ""),
        ("device", "  "),
        ("strict", "maybe"),
        ("strict", ""),
        ("cpu_devices", "0"),
        ("cpu_devices", "1025"),
        ("cpu_devices", "two"),
        ("cpu_devices", "2.0"),
        ("out", ""),
    ],
)
def test_a_text_that_does_not_parse_is_an_error(name: str, text: str) -> None:
    """The message has the variable, its value, what is accepted, and what to do."""
    row = SETTINGS[name]
    with pytest.raises(SettingsError) as error:
        read_environment({row.variable: text})
    assert str(error.value) == f"{row.variable}={text!r} was set; accepted: {row.accepts}. Correct or unset it."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", 3),
        ("device", ""),
        ("strict", 1),
        ("strict", "yes"),
        ("cpu_devices", True),
        ("cpu_devices", 2.0),
        ("cpu_devices", "2"),
        ("cpu_devices", 0),
        ("out", b"runs"),
        ("out", 7),
    ],
)
def test_an_argument_of_a_wrong_type_is_an_error(name: str, value: Any) -> None:
    """An argument is accepted where its text would be, and only in its own type."""
    with pytest.raises(SettingsError, match=rf"patch\({name}=.* was asked; accepted: "):
        resolve({}, **{name: value})


def test_a_path_object_is_a_path() -> None:
    """`out` takes what os.fspath takes."""
    assert resolve({}, out=Path("runs") / "a").out == "runs/a"


@given(st.sampled_from(["1", "true", "Yes", " ON "]), st.sampled_from(["0", "False", "no", "off "]))
def test_flags_are_read_as_people_write_them(yes: str, no: str) -> None:
    """Case and blanks do not matter in a flag."""
    assert read_environment({"LLM_ADAPT_STRICT": yes}).strict is True
    assert read_environment({"LLM_ADAPT_STRICT": no}).strict is False


@given(st.integers(1, 1024))
def test_counts_are_read_back(count: int) -> None:
    """Every count in range means itself, as text and as a number."""
    assert read_environment({"LLM_ADAPT_CPU_DEVICES": str(count)}) == resolve({}, cpu_devices=count)


@given(st.dictionaries(st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", min_size=1), st.text()))
def test_other_peoples_variables_are_not_read(environ: dict[str, str]) -> None:
    """Only names with the prefix are looked at."""
    others = {name: value for name, value in environ.items() if not name.startswith("LLM_ADAPT_")}
    assert read_environment(others) == Settings()
