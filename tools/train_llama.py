"""Train a Llama on bytes of the Python language reference: the one the tests quantize, or one ten times as large.

    python tools/train_llama.py tiny tests/data/tiny-llama   # 0.6 M parameters, five minutes of one core
    python tools/train_llama.py small small-llama            # 6.4 M parameters, twenty minutes of two cores

The weights of neither were ever stored in few bits, as those of the demo model were; `small` is what claims at 4 bits
are measured on. The committed `tiny` comes from Python 3.11.7 and torch 2.13.0: on the evaluation part, in 48 windows
of 512 bytes, its loss is 1.362 nats per byte, a perplexity of 3.904. Another Python carries another text, and another
processor rounds differently: both give another model of the same kind.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantforge import api
from quantforge.calibrate import corpus

LONG_SHARE = 0.15  # the last steps see windows of LONG tokens, the others of SHORT, which are cheaper
SHORT, LONG = 128, 512
SPECIALS = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True)
class Size:
    """A model, and how long and how fast it learns.

    tokens   of one step
    rate     the highest learning rate
    spread   standard deviation of the weights at the start
    threads  of torch; one gives the same model on every run
    """

    width: int
    inner: int
    blocks: int
    steps: int
    tokens: int
    rate: float
    spread: float
    threads: int


SIZES = {
    "tiny": Size(width=128, inner=256, blocks=4, steps=2400, tokens=1024, rate=4e-3, spread=0.05, threads=1),
    "small": Size(width=256, inner=768, blocks=8, steps=1000, tokens=2048, rate=2e-3, spread=0.03, threads=2),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes, after three special ones that text never yields."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=LONG
    )


def make_model(size: Size) -> LlamaForCausalLM:
    """Return an untrained Llama with tied embeddings; seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + len(SPECIALS),
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
        initializer_range=size.spread,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, size: Size) -> float:
    """Return the rate at `step`: up over the first 100 steps, then down along a cosine to a hundredth."""
    return size.rate * min(step / 100, 0.01 + 0.99 * (1 + math.cos(math.pi * step / size.steps)) / 2)


def train(model: LlamaForCausalLM, ids: Tensor, size: Size) -> None:
    """Train on windows drawn from `ids` [tokens] with AdamW; prints the loss now and then."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start, seen = time.perf_counter(), []
    for step in range(1, size.steps + 1):
        length = LONG if step > size.steps * (1 - LONG_SHARE) else SHORT
        places = torch.randint(len(ids) - length, (size.tokens // length,), generator=draw)
        batch = torch.stack([ids[p : p + length] for p in places.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, size)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(float(loss.detach()))
        if step % 100 == 0:
            print(f"step {step}: loss {sum(seen[-100:]) / 100:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    o = parser.parse_args()
    size = SIZES[o.size]
    torch.set_num_threads(size.threads)
    tokenizer, model = byte_tokenizer(), make_model(size)
    text = corpus.load_text("python-docs", "calibration")
    train(model, torch.tensor(tokenizer(text.text, verbose=False)["input_ids"]), size)
    model = model.bfloat16()
    model.save_pretrained(o.folder)
    tokenizer.save_pretrained(o.folder)
    ids = corpus.windows(corpus.load_text("python-docs", "evaluation"), tokenizer, LONG, 48).ids
    score = api.evaluate(model.float().eval(), data=ids).perplexity
    parameters = sum(p.numel() for p in model.parameters())
    print(f"Python {platform.python_version()}, torch {torch.__version__}: {parameters:,} parameters, ", end="")
    print(f"evaluation loss {math.log(score):.3f} nats per byte, perplexity {score:.3f}")


if __name__ == "__main__":
    main()
