"""The child of end_to_end.py: one transformers model in training, told by its standard input when to make steps.

    python benchmarks/training_steps.py --model llama --mode on     then write "3" to make three steps, "end" to end

Each answer is one line of JSON that begins with "@". The parent has several such processes, each with the model under
another mode, and lets them make steps in turn; one that waits uses no processor.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

MODES = ("unpatched", "off", "on", "liger")
# Hidden size, layers, intermediate size, heads, key heads, vocabulary.
SIZES = {
    "16M": (384, 6, 1024, 6, 2, 8192),
    "0.1B": (768, 12, 2048, 12, 4, 32000),
    "0.3B": (1024, 20, 2816, 16, 4, 32000),
    "1B": (2048, 16, 8192, 32, 8, 128256),
}


def parse() -> argparse.Namespace:
    """The options; the parent writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "mistral", "mixtral"), default="llama")
    parser.add_argument("--mode", choices=MODES, default="on", help="liger: plain transformers with its patches")
    parser.add_argument("--size", choices=sorted(SIZES), default="16M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--attention", default="sdpa", help="attn_implementation (sdpa, eager)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ops", help="policy of mode on")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> float:
    """Patch as the mode says, before torch and transformers are imported; the milliseconds that it took."""
    start = time.perf_counter()
    if args.mode in ("off", "on"):
        import llm_adapt

        llm_adapt.patch(device=args.device, ops="off" if args.mode == "off" else args.ops)
    elif args.mode == "liger":
        import liger_kernel.transformers as liger

        getattr(liger, f"apply_liger_kernel_to_{args.model}")()
    return (time.perf_counter() - start) * 1e3


def build(args: argparse.Namespace) -> Any:
    """The model with random weights of a fixed seed, in training mode."""
    import torch
    import transformers

    hidden, layers, intermediate, heads, key_heads, vocabulary = SIZES[args.size]
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary,
        "max_position_embeddings": max(4096, args.tokens), "use_cache": False, "attn_implementation": args.attention,
    }  # fmt: skip
    if args.model == "mixtral":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": intermediate // 2}
    config = {"llama": "LlamaConfig", "mistral": "MistralConfig", "mixtral": "MixtralConfig"}[args.model]
    torch.manual_seed(0)
    with torch.device(args.device):  # a billion random numbers take the host a minute
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    return model.to(torch.device(args.device), getattr(torch, args.dtype)).train()


def answer(value: dict[str, Any]) -> None:
    """One line for the parent; whatever else is printed does not begin with @."""
    print("@" + json.dumps(value), flush=True)


def peak_bytes(device: str) -> int:
    """The most memory so far: of the allocator on an accelerator, of the whole process on the CPU."""
    import torch

    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(getattr(torch, device).max_memory_allocated())


def served() -> list[dict[str, Any]]:
    """What dispatch served, from its receipt."""
    from llm_adapt.ops.dispatch.receipt import receipt

    keys = ("op", "library", "variant", "dtype", "calls", "reason")
    return [{key: row[key] for key in keys} for row in receipt()]


def main() -> None:
    """Build, then make steps whenever the parent says so."""
    args = parse()
    patch_ms = prepare(args)
    import torch

    model = build(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    answer({"ready": True, "parameters": parameters, "patch_ms": patch_ms, "versions": {"torch": torch.__version__}})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        losses, seconds = [], []
        for _ in range(int(line)):
            rows = (args.batch, args.tokens)
            batch = torch.randint(model.config.vocab_size, rows, generator=generator).to(args.device)
            start = time.perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))  # waits for the device
            if args.device != "cpu":
                getattr(torch, args.device).synchronize()
            seconds.append(time.perf_counter() - start)
        answer({"losses": losses, "seconds": seconds})
    answer({"peak_bytes": peak_bytes(args.device), "served": served() if args.mode == "on" else []})


if __name__ == "__main__":
    main()
