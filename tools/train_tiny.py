"""Train the small Llama that the tests quantize: 0.6 M parameters, bytes in, the Python language reference learnt.

    OMP_NUM_THREADS=1 python tools/train_tiny.py tests/data/tiny-llama

Takes five minutes of one core. The committed weights come from Python 3.11.7 and torch 2.13.0: on the evaluation part,
in 48 windows of 512 bytes, their loss is 1.362 nats per byte, a perplexity of 3.904. Another Python carries another
text, and another processor rounds differently: both give another model of the same kind.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantforge import api
from quantforge.calibrate import corpus

STEPS = 2400
TOKENS = 1024  # of one step
LONG_SHARE = 0.15  # the last steps see windows of LONG tokens, the others of SHORT, which are cheaper
SHORT, LONG = 128, 512
PEAK_RATE = 4e-3
SPECIALS = ("<pad>", "<s>", "</s>")


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


def make_model() -> LlamaForCausalLM:
    """Return an untrained Llama of four blocks, width 128, with tied embeddings; seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + len(SPECIALS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int) -> float:
    """Return the rate at `step`: up over the first 100 steps, then down along a cosine to a hundredth."""
    return PEAK_RATE * min(step / 100, 0.01 + 0.99 * (1 + math.cos(math.pi * step / STEPS)) / 2)


def train(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Train on windows drawn from `ids` [tokens] with AdamW; prints the loss now and then."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start, seen = time.perf_counter(), []
    for step in range(1, STEPS + 1):
        length = LONG if step > STEPS * (1 - LONG_SHARE) else SHORT
        places = torch.randint(len(ids) - length, (TOKENS // length,), generator=draw)
        batch = torch.stack([ids[p : p + length] for p in places.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(float(loss.detach()))
        if step % 100 == 0:
            print(f"step {step}: loss {sum(seen[-100:]) / 100:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def main(folder: Path) -> None:
    """Train, save in bfloat16 to `folder`, and print the perplexity per byte on the evaluation text."""
    torch.set_num_threads(1)
    tokenizer, model = byte_tokenizer(), make_model()
    text = corpus.load_text("python-docs", "calibration")
    train(model, torch.tensor(tokenizer(text.text, verbose=False)["input_ids"]))
    model = model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = corpus.windows(corpus.load_text("python-docs", "evaluation"), tokenizer, LONG, 48).ids
    score = api.evaluate(model.float().eval(), data=ids).perplexity
    parameters = sum(p.numel() for p in model.parameters())
    print(f"Python {platform.python_version()}, torch {torch.__version__}: {parameters:,} parameters, ", end="")
    print(f"evaluation loss {math.log(score):.3f} nats per byte, perplexity {score:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
