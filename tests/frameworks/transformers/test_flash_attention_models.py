"""attn_implementation="flash_attention_2" and its kin on a device without flash-attn: models compute eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="run: pip install transformers==5.24.0")

from attention_models import MODELS, build, distance, one_thread, padding, served, step, tokens  # noqa: F401 - a fixture

FLOAT32 = 2e-5  # of the largest value of a tensor
BFLOAT16 = 6e-2


def eager(name: str, side: str, dtype: torch.dtype = torch.float32, **values: Any) -> tuple[dict[str, Any], Any]:
    """What transformers' own eager attention computes, and generates."""
    ids = tokens()
    mask = padding(side, ids)
    model = build(name, "eager", dtype, **values)
    return step(model, ids, mask), generated(model, ids, mask)


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """Greedy tokens with a cache; None for right padding, which generate refuses to continue sensibly."""
    if not mask[:, -1].all():
        return None
    return model.eval().generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **options).tolist()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_flash_attention_2_is_eager(name: str, side: str) -> None:
    """Logits, the gradients of all parameters and greedy tokens are those of eager, padded at either side or not."""
    expected, expected_tokens = eager(name, side)
    ids = tokens()
    mask = padding(side, ids)
    with served():
        model = build(name, "flash_attention_2")
        assert "flash" in model.config._attn_implementation
        assert distance(step(model, ids, mask), expected) < FLOAT32
        assert generated(model, ids, mask) == expected_tokens


@pytest.mark.parametrize("attn", ["flash_attention_3", "flash_attention_4", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_the_other_names_are_served_too(name: str, attn: str) -> None:
    """Versions 3 and 4 and the name of a repository on the hub compute the same; nothing is fetched."""
    expected, expected_tokens = eager(name, "left")
    ids = tokens()
    mask = padding("left", ids)
    with served():
        model = build(name, attn)
        assert distance(step(model, ids, mask), expected) < FLOAT32
        assert generated(model, ids, mask) == expected_tokens


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_near_eager_in_float32(name: str) -> None:
    """In bfloat16 logits and gradients are as near to float32 as eager in bfloat16 is, or nearer than 6 %."""
    ids = tokens()
    mask = padding("left", ids)
    exact = step(build(name, "eager"), ids, mask)
    theirs = distance(step(build(name, "eager", torch.bfloat16), ids, mask), exact)
    with served():
        ours = distance(step(build(name, "flash_attention_2", torch.bfloat16), ids, mask), exact)
    assert ours < max(1.5 * theirs, BFLOAT16)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_do_not_see_each_other(name: str, how: str) -> None:
    """Three sequences in one row give the logits that each gives alone, told by positions or by cumulative lengths."""
    parts = tokens(1, 20).split([9, 4, 7], dim=1)
    model = build(name, "eager").eval()
    with torch.no_grad():
        expected = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    ends = torch.tensor([0, 9, 13, 20], dtype=torch.int32)
    inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    if how == "cu_seq_lens":
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    with served(), torch.no_grad():
        found = build(name, "flash_attention_2").eval()(torch.cat(parts, 1), **inputs).logits
    assert distance({"logits": found}, {"logits": expected}) < FLOAT32


def test_packed_sequences_train() -> None:
    """The gradients of a packed row are the sums of those of its sequences."""
    parts = tokens(1, 20).split([9, 4, 7], dim=1)
    model = build("GptOss", "eager")
    for part in parts:
        model(part).logits.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with served():
        packed = build("GptOss", "flash_attention_2")
        packed(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits.square().sum().backward()
    assert distance({name: p.grad for name, p in packed.named_parameters() if p.grad is not None}, expected) < FLOAT32


@pytest.mark.parametrize("attn", ["flash_attention_2", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_static_cache_generates_the_same(name: str, attn: str) -> None:
    """With a cache whose keys are longer than what is filled, greedy tokens are those of the dynamic cache."""
    expected = eager(name, "left")[1]
    ids = tokens()
    mask = padding("left", ids)
    with served():
        assert generated(build(name, attn), ids, mask, cache_implementation="static", disable_compile=True) == expected


def test_the_implementation_can_be_changed_on_a_model() -> None:
    """set_attn_implementation goes from one to another and back, and to none that transformers does not know."""
    ids = tokens()
    mask = padding("none", ids)
    expected = step(build("Mistral", "eager"), ids, mask)
    with served():
        model = build("Mistral", "sdpa")
        for attn in ("flash_attention_2", "eager", "flash_attention_3", "sdpa"):
            model.set_attn_implementation(attn)
            assert model.config._attn_implementation == attn
            assert distance(step(model, ids, mask), expected) < FLOAT32
        with pytest.raises(ValueError, match="flash_attention_9"):
            model.set_attn_implementation("flash_attention_9")


@pytest.mark.parametrize("attn", ["flash_attention_2", "sdpa"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(attn: str, use_reentrant: bool) -> None:
    """Recomputed layers give the same gradients, also with dropout: recompute draws the same seed."""
    ids = tokens()
    mask = padding("none", ids)
    with served():
        plain, again = (build("Llama", attn, attention_dropout=0.3).train() for _ in range(2))
        again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        expected = step(plain, ids, mask)
        torch.manual_seed(3)
        assert distance(step(again, ids, mask), expected) < FLOAT32


@pytest.mark.parametrize("attn", ["flash_attention_2", "sdpa"])
def test_dropout_follows_the_seed(attn: str) -> None:
    """The same seed drops the same, another seed other weights; in eval nothing is dropped."""
    ids = tokens()
    with served(), torch.no_grad():
        model = build("Llama", attn, attention_dropout=0.4).train()

        def logits(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            found: torch.Tensor = model(ids).logits
            return found

        assert torch.equal(logits(1), logits(1))
        assert not torch.allclose(logits(1), logits(2))
        model.eval()
        assert torch.equal(logits(1), logits(2))
