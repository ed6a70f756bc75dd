"""How transformers comes to our flash-attention, whatever is imported when, and how it loses it again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="run: pip install transformers==5.24.0")

from attention_models import build, distance, one_thread, padding, served, step, tokens  # noqa: F401 - a fixture

import llm_adapt
from llm_adapt.adapters import adapters
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import attention, flash_loader
from llm_adapt.frameworks.transformers.flash import flash_attn_func
from llm_adapt.patching import Entry, Patch
from llm_adapt.report import Report
from llm_adapt.settings import Settings

ROOT = Path(__file__).parents[3]
UTILS = "transformers.modeling_flash_attention_utils"
CACHES = (
    "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn",
    "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn",
)  # fmt: skip


def everything() -> dict[str, Any]:
    """Every object of transformers that a row changes, and the memory of its loader."""
    from transformers import masking_utils, modeling_flash_attention_utils, modeling_utils
    from transformers.integrations import flash_attention, sdpa_attention

    utils = modeling_flash_attention_utils
    assert set(CACHES) == {"_loaded_implementation", *(name for name in vars(utils) if name.endswith("_fn"))}
    names = (*CACHES, "lazy_import_flash_attention", "is_flash_attn_available", "_lazy_imports")
    return {
        **{f"attention {name}": value for name, value in modeling_utils.AttentionInterface._global_mapping.items()},
        **{f"mask {name}": value for name, value in masking_utils.AttentionMaskInterface._global_mapping.items()},
        **{f"matrix {name}": value for name, value in utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()},
        **{name: vars(utils)[name] for name in names},
        "copy of the loader": modeling_utils.lazy_import_flash_attention,
        "sdpa": sdpa_attention.sdpa_attention_forward,
        "top left": flash_attention._use_top_left_mask,
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    """The names under which another object stands, or none."""
    return {name for name in found.keys() | expected.keys() if found.get(name) is not expected.get(name)}


def test_unpatch_puts_every_object_back() -> None:
    """After unpatch() each registry entry, function and cache is the very object it was, also after models ran."""
    before = everything()
    with llm_adapt.patched(device="cpu") as report:
        during = everything()
        model = build("GptOss", "flash_attention_2")
        step(model, tokens(), padding("left", tokens()))
        text = str(report)
        assert "op: attention layout='thd'" in text
        assert (
            "chunked - first in order that serves, openmp: has no kernel of this op; torch_native: does not honour"
            in text
        )
    changed = differences(during, before)
    assert {"attention sdpa", "sdpa", "lazy_import_flash_attention", "copy of the loader"} < changed
    assert {name for name in changed if name.startswith("mask")} == {f"mask {name}" for name in flash_loader.HUB_NAMES}
    assert differences(everything(), before) == set()


def test_every_name_has_its_mask() -> None:
    """Each attention function that was added, under whatever name, has an entry among the masks."""
    with served():
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert {name for name in ALL_ATTENTION_FUNCTIONS if "flash" in name} <= set(ALL_MASK_ATTENTION_FUNCTIONS)


def test_all_repositories_that_transformers_names_are_known() -> None:
    """Every repository that stands for flash-attention in this version of transformers is served by name."""
    utils = importlib.import_module(UTILS)
    named = {*utils.FLASH_ATTN_KERNEL_FALLBACK.values(), *utils.FLASH_ATTN_KERNEL_DEVICES}
    assert named <= set(flash_loader.HUB_NAMES)


def test_other_implementations_go_to_the_original_loader() -> None:
    """A kernel of somebody else is loaded by transformers, which says what it lacks for that."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention as theirs

    with served():
        utils = importlib.import_module(UTILS)
        (dense, packed, paged, _, _), _ = utils.lazy_import_flash_attention("flash_attention_2")
        assert (dense.__name__, packed.__name__, paged) == ("flash_attn_func", "flash_attn_varlen_func", None)
        with pytest.raises(ImportError, match="kernels"):
            utils.lazy_import_flash_attention("somebody/attention")
        assert utils.lazy_import_flash_attention(None)[0][0] is dense
    with pytest.raises(ValueError, match="Could not find any flash attn implementation"):
        theirs(None)


def test_without_the_operator_it_is_refused() -> None:
    """What the tests here show is ours: outside of a patch transformers has no flash-attention on this machine."""
    with pytest.raises(ImportError, match="FlashAttention2"):
        build("Llama", "flash_attention_2")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("Falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
        # Of local layers its flash-attention drops the window.
        ("GPTNeo", {"num_heads": 4, "attention_types": [[["global"], 2]]}),
    ],
)
@pytest.mark.parametrize("is_early", [True, False])
def test_models_that_bind_the_function_at_import(kind: str, values: dict[str, Any], is_early: bool) -> None:
    """Old models look for flash-attention while they are imported: they find it, imported before patch() or after."""
    import transformers

    values |= {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_layers": 2, "num_attention_heads": 4}
    values |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0}
    name = f"transformers.models.{ {'Falcon': 'falcon.modeling_falcon', 'GPTNeo': 'gpt_neo.modeling_gpt_neo'}[kind] }"
    home = importlib.import_module(name)
    assert "_flash_attention_forward" not in vars(home)
    ids = tokens()
    results = []
    for attn in ("eager", "flash_attention_2"):
        with served():
            if not is_early:
                importlib.reload(home)
            assert home.is_flash_attn_available(kernels_fallback_ok=True)  # without a look at the hub
            cls = vars(home)[f"{kind}ForCausalLM"]
            torch.manual_seed(0)
            model = cls._from_config(getattr(transformers, f"{kind}Config")(**values), attn_implementation=attn)
            results.append(step(model, ids, padding("left", ids)))
    assert distance(results[1], results[0]) < 2e-5
    assert not home.is_flash_attn_available()
    importlib.reload(home)
    assert "_flash_attention_forward" not in vars(home)


def script(*lines: str, **environment: str) -> Any:
    """What a fresh process prints as JSON; any look at the network is an error there."""
    deaf = "import socket\ndef refuse(*args, **kwargs): raise AssertionError('network')\nsocket.getaddrinfo = refuse"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((deaf, *lines))],
        env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("early", ["", "from transformers import GptOssForCausalLM"])
def test_the_order_of_imports_does_not_matter(early: str) -> None:
    """patch() before transformers or after it and the model's module: the same functions serve."""
    found = script(
        early,
        "import llm_adapt; llm_adapt.patch(device='cpu')",
        "import json, attention_models as models",
        "model = models.build('GptOss', 'flash_attention_2')",
        "ids = models.tokens()",
        "found = models.step(model, ids, models.padding('left', ids))",
        "model.set_attn_implementation('eager')",
        "expected = models.step(model, ids, models.padding('left', ids))",
        "from llm_adapt.ops.dispatch.receipt import receipt",
        "ops = sorted({row['op'] + ' ' + row['library'] for row in receipt() if row['op'] == 'attention'})",
        "lines = [line.subject for line in llm_adapt.report().lines if line.status in ('problem', 'skipped')]",
        "lines = [line for line in lines if 'attention' in line or 'mask' in line]",
        "print(json.dumps([models.distance(found, expected), ops, lines]))",
    )
    assert found[0] < 2e-5
    assert found[1:] == [["attention chunked"], []]


def test_the_rows_import_no_framework() -> None:
    """Planning costs nothing: transformers and the operator are not imported by it."""
    found = script(
        "import sys, json, torch",
        "from llm_adapt.adapters import adapters",
        "from llm_adapt.frameworks.context import Context",
        "from llm_adapt.frameworks.transformers import attention",
        "from llm_adapt.report import Report",
        "from llm_adapt.settings import Settings",
        "rows = attention.rows(Context(adapters()['npu'], Settings(), Report()))",
        "print(json.dumps([len(rows), 'transformers' in sys.modules, 'llm_adapt.ops.attention' in sys.modules]))",
    )
    assert found == [5, False, False]


@pytest.mark.parametrize("device", ["cuda", "dcu", "npu", "mlu", "cpu"])
def test_what_fetches_kernels_for_the_device_is_left_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device is torch.cuda and the kernels package is there, only "sdpa" is replaced; the report says so."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    report = Report()
    targets = [row.target for row in attention.rows(Context(adapters()[device], Settings(), report))]
    is_left = device in ("cuda", "dcu")
    assert len(targets) == (1 if is_left else 5)
    assert [line.choice for line in report.lines] == ["left alone"] * is_left


@pytest.mark.parametrize("device", ["cuda", "dcu", "npu", "mlu", "cpu"])
def test_a_version_that_is_installed_keeps_its_loader(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device is torch.cuda, a version that transformers finds is its own, with its loader and its checks."""
    utils = importlib.import_module(UTILS)

    def theirs(q: Any, k: Any, v: Any) -> Any:
        """A function of the device."""

    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: (theirs, theirs, None, theirs, theirs))
    for name in CACHES:
        monkeypatch.setattr(utils, name, vars(utils)[name])  # put back in the end
    facts = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2] | {"general_availability_check": lambda: True}
    monkeypatch.setitem(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX, 2, facts)
    report = Report()
    rows = list(flash_loader._loader(utils, Context(adapters()[device], Settings(), report)))
    is_theirs = device in ("cuda", "dcu")
    assert [row.key for row in rows if isinstance(row, Entry)] == [2, 3, 4][is_theirs:]
    assert [line.subject for line in report.lines] == ["flash_attention_2"] * is_theirs
    (wrap,) = (row.new for row in rows if isinstance(row, Patch) and row.kind == "wrap")
    load = wrap(utils.lazy_import_flash_attention)
    assert load("flash_attention_3")[0][0] is flash_attn_func
    assert load(None)[0][0] is flash_attn_func  # nothing of theirs has been loaded
    assert load("flash_attention_2")[0][0] is (theirs if is_theirs else flash_attn_func)
    assert load(None)[0][0] is (theirs if is_theirs else flash_attn_func)


def test_a_loader_that_has_changed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader with another body is skipped with a reason: what is returned to it might not fit."""
    utils = importlib.import_module(UTILS)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda implementation: None)
    with pytest.raises(llm_adapt.errors.PatchError, match="lazy_import_flash_attention has changed"):
        list(flash_loader._loader(utils, Context(adapters()["cpu"], Settings(), Report())))
