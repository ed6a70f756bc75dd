"""transformers models trained by CUDA code, unchanged, on the device that the tests run on, by our operators.

pytest tests/devices/test_transformers.py [--simulate npu | mlu | dcu] [--device npu]
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.ops.dispatch.receipt import receipt

pytestmark = pytest.mark.every_device

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
}


def losses(name: str, attention: str, dtype: torch.dtype) -> list[float]:
    """The losses of four training steps, as a CUDA script writes them."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=attention)
    model = model.to(dtype).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(1)).to("cuda:0")
    found = []
    for _ in range(4):
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_with_its_own_code(
    name: str, dtype: torch.dtype, adapter_name: str, pytestconfig: pytest.Config
) -> None:
    """flash_attention_2, without flash-attn, gives the losses that eager attention has in transformers' own code."""
    simulate = pytestconfig.getoption("--simulate")
    with llm_adapt.patched(device=adapter_name, simulate=simulate, ops="off"):
        expected = losses(name, "eager", torch.float32)
    with llm_adapt.patched(device=adapter_name, simulate=simulate):
        found = losses(name, "flash_attention_2", dtype)
        served = {row["op"]: row for row in receipt()}
        assert {"attention", "rms_norm", "rope", "glu", "cross_entropy"} <= set(served)
        assert not any("quarantine" in row for row in served.values())
    assert found == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-2)
