"""The policy: one parser for text, TOML and mappings; unknown names are errors with the nearest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_adapt
from llm_adapt.errors import SettingsError
from llm_adapt.ops import using
from llm_adapt.ops.dispatch.in_force import policy_in_force
from llm_adapt.ops.dispatch.policy import Policy, Proof, parse_policy, parse_proof
from llm_adapt.ops.dispatch.receipt import policy_text
from llm_adapt.ops.dispatch.registry import library_names, op_names

EVERYTHING = (
    "rms_norm=torch_native, *=reference; *.mlp.*:rms_norm=torch_native\n-torch_native.rms_norm, order=torch_native"
)
FOUND = {
    "choose": {"rms_norm": "torch_native", "*": "reference"},
    "layers": (("*.mlp.*", "rms_norm", "torch_native"),),
    "deny": frozenset({"torch_native.rms_norm"}),
    "order": ("torch_native",),
}
TOML = """
order = ["torch_native"]
deny = ["torch_native.rms_norm"]
[choose]
rms_norm = "torch_native"
"*" = "reference"
[layers."*.mlp.*"]
rms_norm = "torch_native"
"""


def test_every_part_as_text() -> None:
    """Parts are separated by commas, semicolons or line ends."""
    assert parse_policy(EVERYTHING) == FOUND
    assert parse_policy(" , ") == {}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reading TOML needs Python 3.11")
def test_the_same_as_toml(tmp_path: Path) -> None:
    """A file says the same as a table."""
    path = tmp_path / "ops.toml"
    path.write_text(TOML)
    assert parse_policy(path) == parse_policy(str(path)) == FOUND


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rms_nrom=reference", "op 'rms_nrom' was asked; it is unknown. did you mean rms_norm"),
        ("rms_norm=torch_nativ", "kernel library 'torch_nativ' was asked; it is unknown. did you mean torch_native"),
        ("-torch_nativ", "did you mean torch_native"),
        ("-torch_native.rms", "op 'rms' was asked; it is unknown"),
        ("order=torch_native>nonsense", "kernel library 'nonsense'"),
        ("*:zzz=reference", "op 'zzz' was asked; it is unknown. There are: "),
        ("rms_norm", "write OP=LIBRARY"),
        ("=reference", "write OP=LIBRARY"),
        ("rms_norm=", "write OP=LIBRARY"),
        ("nothing/here.toml", "the file cannot be read"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    """Each error says what was asked and what is near."""
    with pytest.raises(SettingsError, match="ops") as error:
        parse_policy(text)
    assert message in str(error.value)
    with pytest.raises(SettingsError), llm_adapt.patched(device="cpu", ops=text):
        pass
    assert not llm_adapt.is_patched()


@pytest.mark.parametrize(
    "table", [{"chose": {}}, {"choose": ["rms_norm"]}, {"order": 3}, {"layers": {"*": "rms_norm"}}]
)
def test_a_table_of_the_wrong_form(table: dict[str, Any]) -> None:
    """Unknown parts and parts of the wrong form are errors."""
    with pytest.raises(SettingsError, match=r"ops: (part 'chose'|\w+=.* has the wrong form)"):
        parse_policy(table)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reading TOML needs Python 3.11")
def test_a_broken_file(tmp_path: Path) -> None:
    """A file that is no TOML is an error with its path and the place."""
    path = tmp_path / "ops.toml"
    path.write_text("order = [")
    with pytest.raises(SettingsError, match=r"ops\.toml.*cannot be read"):
        parse_policy(path)


names = st.sampled_from([*op_names(), "*"])
libraries = st.sampled_from(library_names())


@given(st.dictionaries(names, libraries), st.lists(libraries, unique=True), st.frozensets(libraries))
def test_text_and_table_mean_the_same(choose: dict[str, str], order: list[str], deny: frozenset[str]) -> None:
    """Whatever can be said in a table can be said as text."""
    parts = [f"{op}={library}" for op, library in choose.items()] + [f"-{name}" for name in deny]
    parts += ["order=" + ">".join(order)] if order else []
    table: dict[str, Any] = {"choose": choose, "deny": sorted(deny), "order": order}
    assert parse_policy(", ".join(parts)) == parse_policy({key: value for key, value in table.items() if value})


def test_the_nearest_choice_counts() -> None:
    """A layer's choice counts before the op's, the op's before "*", and the first pattern before the next."""
    policy = Policy(
        choose={"rms_norm": "a", "*": "b"}, layers=(("x.*", "rms_norm", "c"), ("x.*", "*", "d"), ("*", "rope", "e"))
    )
    asked = [("rms_norm", ""), ("rope", ""), ("rms_norm", "x.0"), ("glu", "x.0"), ("rope", "x.0"), ("rope", "y")]
    assert [policy.chosen(*pair) for pair in asked] == ["a", "b", "c", "d", "d", "e"]
    assert Policy().chosen("rope", "x") == ""


def test_proofs() -> None:
    """off, first, strict and sample:N."""
    found = [parse_proof(text) for text in ("off", "first", "strict", "sample:100")]
    assert found == [Proof(False), Proof(), Proof(raises=True), Proof(every=100)]
    for text in ("", "on", "sample", "sample:0", "sample:-1", "first:3"):
        with pytest.raises(ValueError, match="none of off, first"):
            parse_proof(text)


def test_patch_puts_the_policy_in_force() -> None:
    """patch() takes the device's order of libraries, then what the user says; unpatch() takes it back."""
    assert policy_in_force().order == ()
    with llm_adapt.patched(device="cpu", ops="rms_norm=reference", proof="sample:7") as report:
        policy = policy_in_force()
        assert policy.order == llm_adapt.current_adapter().kernel_libraries
        assert (dict(policy.choose), policy.proof) == ({"rms_norm": "reference"}, Proof(every=7))
        (line,) = [line for line in report.lines if line.section == "ops"]
        assert "rms_norm=reference" in line.choice
        assert "at each 7-th call" in line.reason
    assert policy_in_force().order == ()
    assert policy_text() == "no library is in the order"


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM_ADAPT_OPS and LLM_ADAPT_PROOF say the same as the arguments."""
    monkeypatch.setenv("LLM_ADAPT_OPS", "-torch_native")
    monkeypatch.setenv("LLM_ADAPT_PROOF", "off")
    with llm_adapt.patched(device="cpu"):
        assert policy_in_force().deny == frozenset({"torch_native"})
        assert not policy_in_force().proof.at_first_use
    monkeypatch.setenv("LLM_ADAPT_PROOF", "maybe")
    with pytest.raises(SettingsError, match="LLM_ADAPT_PROOF='maybe' was set; accepted: off, first, strict"):
        llm_adapt.patch(device="cpu")


def test_a_block_with_parts_of_a_policy() -> None:
    """`using` puts parts over what is in force, nests, and takes them back, also after an error."""
    with llm_adapt.patched(device="cpu", ops="-chunked"):
        order = policy_in_force().order
        with using("rms_norm=reference", proof="strict"):
            with using({"choose": {"rope": "reference"}}):
                policy = policy_in_force()
                assert policy.choose == {"rms_norm": "reference", "rope": "reference"}
                assert (policy.order, policy.deny, policy.proof) == (order, frozenset({"chunked"}), Proof(raises=True))
            with pytest.raises(ZeroDivisionError), using("order=chunked"):
                assert policy_in_force().order == ("chunked",)
                _ = 1 / 0
            assert policy_in_force().choose == {"rms_norm": "reference"}
        assert policy_in_force().choose == {}
    with pytest.raises(SettingsError, match="proof='maybe' was asked"), using(proof="maybe"):
        pass
