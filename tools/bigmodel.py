"""Write a random Llama of any size to disk, block by block, for measurements of memory: `python tools/bigmodel.py OUT`.

Weights are bfloat16, drawn by a seed; the shape of 7B is the default. No more than a file's worth is in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from quantforge import shards
from quantforge.models.load import read_tokenizer

TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "tiny-llama"  # of bytes


def tensors(config: LlamaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model by name, drawn with a spread that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = width // config.num_attention_heads * config.num_key_value_heads

    def drawn(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=generator)

    yield "model.embed_tokens.weight", drawn(vocab, width)
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}"
        sizes = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, width)}
        yield f"{block}.input_layernorm.weight", torch.ones(width, dtype=torch.bfloat16)
        for name, size in sizes.items():
            yield f"{block}.self_attn.{name}.weight", drawn(*size)
        yield f"{block}.post_attention_layernorm.weight", torch.ones(width, dtype=torch.bfloat16)
        for name, size in {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}.items():
            yield f"{block}.mlp.{name}.weight", drawn(*size)
    yield "model.norm.weight", torch.ones(width, dtype=torch.bfloat16)
    yield "lm_head.weight", drawn(vocab, width)


def main() -> None:
    """Read the sizes and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    config = LlamaConfig(
        num_hidden_layers=asked.layers,
        hidden_size=asked.width,
        intermediate_size=asked.inner,
        num_attention_heads=asked.heads,
        num_key_value_heads=asked.kv_heads or asked.heads,
        vocab_size=asked.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    asked.out.mkdir(parents=True)
    config.save_pretrained(asked.out)
    read_tokenizer(TOKENIZER).save_pretrained(asked.out)
    shards.write(asked.out, tensors(config, asked.seed), limit=5 * 10**8)


if __name__ == "__main__":
    main()
