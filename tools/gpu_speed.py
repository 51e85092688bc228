"""Speed on a CUDA GPU: a random model of Llama-3-8B's shape in int4 and FP8 beside bfloat16, and GPTQ of it.

    python tools/gpu_speed.py [--out reports/raw/gpu.json] [--device cuda] [--layers 32] [--hidden 4096] …

Generation is at batch 1, the prompt has 2,048 tokens; samples are taken in turn, medians told. GPTQ calibrates on 128
windows of 2,048 random tokens in 4 bits and groups of 128: the arithmetic alone is 2.4e16 operations at the shape of
8 billion parameters. Sizes can be made small, so that the script itself can be tried without a GPU.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import quantforge
from quantforge.benchmark.measure import generation, in_turn
from quantforge.benchmark.speed import machine
from quantforge.runtime import load

FORMATS = {
    "int4": {"weights": "int4-g128-sym-bf16"},
    "fp8": {"weights": "e4m3-channel", "inputs": "e4m3-token"},
}


def build(asked: argparse.Namespace) -> torch.nn.Module:
    """Return a random model of the shape that was asked for, in bfloat16."""
    config = LlamaConfig(
        hidden_size=asked.hidden,
        intermediate_size=asked.inner,
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.hidden // asked.head,
        num_key_value_heads=max(asked.hidden // asked.head // 4, 1),
        vocab_size=asked.vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    torch.manual_seed(0)
    with torch.device(asked.device):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def main(asked: argparse.Namespace) -> None:
    """Measure, print and write the figures."""
    ids = torch.randint(asked.vocabulary, (asked.samples, asked.prompt), generator=torch.Generator().manual_seed(0))
    models = {"bfloat16": build(asked)}
    with tempfile.TemporaryDirectory() as place:
        for name, how in FORMATS.items():
            quantforge.quantize(build(asked), "rtn", out=Path(place, name), **how)
            models[name] = load.read(Path(place, name), torch.bfloat16, device=asked.device).model
    first = ids[:1].to(asked.device)
    calls = {name: partial(generation, model, first, asked.new, asked.device) for name, model in models.items()}
    with torch.no_grad():
        found = in_turn(calls, asked.rounds)
    seconds = {name: [part.seconds for part in parts] for name, parts in found.items()}
    models.clear()
    calls.clear()
    solved = quantforge.quantize(build(asked), "gptq", weights="int4-g128-sym-bf16", calibration=ids)
    told = {
        "machine": machine(torch.bfloat16, asked.device),
        "shape": vars(asked) | {"out": None},
        "prompt_times_bfloat16": {name: seconds["bfloat16"][0] / first for name, (first, _) in seconds.items()},
        "tokens_per_second": {name: asked.new / rest for name, (_, rest) in seconds.items()},
        "tokens_times_bfloat16": {name: seconds["bfloat16"][1] / rest for name, (_, rest) in seconds.items()},
        "gptq_seconds": solved.seconds,
        "gptq_tokens": ids.numel(),
    }
    print(json.dumps(told, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    sizes = {"layers": 32, "hidden": 4096, "inner": 14336, "head": 128, "vocabulary": 128256}
    for name, size in (sizes | {"samples": 128, "prompt": 2048, "new": 64, "rounds": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    main(parser.parse_args())
