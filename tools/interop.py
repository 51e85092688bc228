"""What loads where: checkpoints of the demo model in every format, each opened by every loader: `make interop`.

    python tools/interop.py ENVIRONMENTS [--only NAME,…]

ENVIRONMENTS is a folder of virtual environments, `stock`, `vllm` and `llamacpp`, in which quantforge is not installed;
one that is missing is left out and said so. A loader runs a script of `tools/loaders` on the folder, given token ids,
and prints what it computed. That is held against quantforge's own reference: stock transformers computes in float32, so
perplexity within 0.1 %, the same greedy tokens and equal weights; vLLM and llama.cpp round activations, so perplexity
within 0.5 % of ours in bfloat16 and the same most probable token as ours in float32 in 97 % of places. llama.cpp must
cut text as the model's own tokenizer does.

The report is written only if every environment is there and no checkpoint is left out; `--only` puts new rows into one
that is there.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantforge
from quantforge.calibrate import corpus
from quantforge.models import load
from quantforge.report.tables import Cell, Column, Table, markdown
from quantforge.solving import Layer

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "reports" / "interop"
SCRIPTS = {"stock": "stock.py", "vllm": "vllm_loader.py", "llamacpp": "llamacpp.py"}
NAMES = {"stock": "transformers", "vllm": "vLLM (CPU)", "llamacpp": "llama.cpp"}
WINDOWS, SEQ_LEN, PROMPTS, NEW_TOKENS = 8, 512, 4, 32
WHY = (
    "Weights are equal in every row that shows them. What is outside of the bounds computes otherwise, as far as can "
    "be told from outside: bitsandbytes packs NF4 anew for a product of its own in bfloat16, and multiplies LLM.int8() "
    "in float16; vLLM rounds inputs to 8 bits from bfloat16; llama.cpp rounds the inputs of every layer to 8 bits in "
    "blocks of 32."
)
WORDS = ("def main():\n    return 1.25", "It's 2026, isn't it?", "naïve café 東京 🙂", "  two  spaces")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to make: what `quantforge.quantize` is asked for, and which loaders are to take it."""

    name: str
    options: Mapping[str, Any]
    loaders: tuple[str, ...]
    dtype: torch.dtype = torch.float32  # that stock transformers computes in


def _rtn(name: str, fmt: str, loaders: tuple[str, ...], **options: Any) -> Checkpoint:
    return Checkpoint(name, {"method": "rtn", "format": fmt, **options}, loaders)


CT, BOTH, STOCK = "compressed-tensors", ("stock", "vllm"), ("stock",)
CHECKPOINTS = (
    Checkpoint("int4-g64-asym", {"method": "gptq", "bits": 4, "group_size": 64, "format": CT}, BOTH),
    _rtn("int4-g64-sym", CT, BOTH, weights="int4-g64-sym"),
    _rtn("int8-channel", CT, STOCK, weights="int8-channel-sym"),  # vLLM's CPU build has no kernel for it
    _rtn("int3-g64-sym", CT, STOCK, weights="int3-g64-sym"),
    _rtn("w8a8", CT, BOTH, weights="int8-channel-sym", inputs="int8-token"),
    _rtn("w4a8", CT, STOCK, weights="int4-g64-sym", inputs="int8-token"),
    _rtn("e4m3-channel", CT, BOTH, weights="e4m3-channel", inputs="e4m3-token"),
    Checkpoint("nvfp4", {"method": "rtn", "format": CT, "weights": "nvfp4"}, STOCK, torch.bfloat16),
    Checkpoint("mxfp4", {"method": "rtn", "format": CT, "weights": "mxfp4"}, STOCK, torch.bfloat16),
    _rtn("mixed-4-8", CT, STOCK, weights="int4-g64-sym", overrides={"*.down_proj": {"bits": 8}}),
    Checkpoint("lorc-adapter", {"method": "rtn+lorc", "bits": 4, "group_size": 64, "format": CT}, STOCK),
    _rtn("gptq-4-sym", "gptq", ("vllm",), bits=4, group_size=64, symmetric=True),
    _rtn("awq-4-asym", "awq", ("vllm",), bits=4, group_size=64),
    Checkpoint("nf4-double", {"method": "nf4", "format": "bitsandbytes"}, STOCK, torch.bfloat16),
    Checkpoint(
        "llm-int8", {"method": "llm-int8", "settings": {"inputs.dynamic": True}, "format": "bitsandbytes"}, STOCK
    ),
    _rtn("q4_0", "gguf", ("stock", "llamacpp"), bits=4, symmetric=True),
    _rtn("q4_1", "gguf", ("stock", "llamacpp"), bits=4, symmetric=False),
    _rtn("q8_0", "gguf", ("stock", "llamacpp"), bits=8, symmetric=True),
)


@dataclass(frozen=True)
class Score:
    """What our own reference computed in one dtype: perplexity, the most probable tokens and greedy texts."""

    perplexity: float
    top: list[int]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Row:
    """How one loader took one checkpoint.

    same_tokens  share of places of the greedy texts with the same token
    same_top     share of places with the same most probable token
    differ       layers whose dequantized weight is another; None where the loader does not show it
    words        texts that the loader's own tokenizer cuts otherwise; None where it has none
    error        its last line, if it failed
    """

    checkpoint: str
    format: str
    loader: str
    perplexity: float
    reference: float
    same_tokens: float
    same_top: float
    differ: int | None
    words: int | None
    seconds: float
    versions: Mapping[str, str]
    error: str = ""

    @property
    def passed(self) -> bool:
        """Tell whether it is within the bounds of its loader."""
        near = 0.001 if self.loader == "stock" else 0.005
        close = math.isfinite(self.perplexity) and abs(self.perplexity / self.reference - 1) <= near
        same = self.same_tokens == 1 if self.loader == "stock" else self.same_top >= 0.97
        return close and same and not self.differ and not self.words

    def line(self) -> str:
        """Return it in a line."""
        told = f"perplexity {self.perplexity:.4f} against {self.reference:.4f}, top-1 {self.same_top:.2%}, "
        told += f"tokens {self.same_tokens:.1%}, other weights {self.differ}, other words {self.words}"
        return f"{self.checkpoint} {NAMES[self.loader]}: {'yes' if self.passed else 'NO'} ({self.error or told})"


def score(model: nn.Module, windows: Tensor, prompts: Tensor) -> Score:
    """Score a model in its own dtype."""
    losses, top = [], list[int]()
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0].float()
            losses.append(float(nn.functional.cross_entropy(logits[:-1], window[1:])))
            top += logits[:-1].argmax(-1).tolist()
        out = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    return Score(math.exp(sum(losses) / len(losses)), top, out[:, prompts.shape[1] :].tolist())


def digests(layers: Iterable[Layer], dtype: torch.dtype) -> dict[str, str]:
    """Return the SHA-256 of each layer's weight dequantized in `dtype`, as float32, without what an adapter adds."""
    dense = {layer.name: layer.weight.base.dequantize(dtype).float() for layer in layers}
    return {name: sha256(weight.numpy().tobytes()).hexdigest() for name, weight in dense.items()}


def run(python: Path, script: str, folder: Path, expected: Path) -> tuple[dict[str, Any] | None, str, float]:
    """Return what a loader's script printed, or None and the last line of its errors; and its seconds."""
    start = time.perf_counter()
    command = [str(python), str(ROOT / "tools" / "loaders" / script), str(folder), str(expected)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    seconds = time.perf_counter() - start
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found, "", seconds
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None, errors[-1] if errors else f"exit {done.returncode}", seconds


def compare(
    checkpoint: Checkpoint, loader: str, found: dict[str, Any] | None, ours: Score, seconds: float, error: str
) -> Row:
    """Hold what a loader computed against our own."""
    fmt = str(checkpoint.options["format"])
    if found is None:
        nan = math.nan
        return Row(checkpoint.name, fmt, loader, nan, ours.perplexity, nan, nan, None, None, seconds, {}, error)
    pairs = [(a, b) for x, y in zip(found["tokens"], ours.tokens, strict=True) for a, b in zip(x, y, strict=True)]
    tops = list(zip(found["top"], ours.top, strict=True))
    return Row(
        checkpoint.name,
        fmt,
        loader,
        found["perplexity"],
        ours.perplexity,
        sum(a == b for a, b in pairs) / len(pairs),
        sum(a == b for a, b in tops) / len(tops),
        None if found["differ"] is None else len(found["differ"]),
        None if found.get("words") is None else len(found["words"]),
        seconds,
        found["versions"],
    )


def table(rows: list[Row]) -> str:
    """Return the table as Markdown."""
    columns = (
        Column("checkpoint", "", text=True),
        Column("format", "", text=True),
        Column("loader", "", text=True),
        Column("within bounds", "of its loader, as said above", text=True),
        Column("perplexity", "the loader's"),
        Column("ours", "in float32 beside transformers, else in bfloat16"),
        Column("same greedy tokens", "of all"),
        Column("same top-1", "of all places"),
        Column("other weights", "layers that dequantize to other numbers"),
        Column("other words", "texts that its tokenizer cuts otherwise"),
    )
    made = []
    for row in rows:
        cells = [
            row.checkpoint,
            row.format,
            NAMES[row.loader],
            "yes" if row.passed else f"no {row.error[:120]}".strip(),
        ]
        cells += [f"{row.perplexity:.4f}", f"{row.reference:.4f}", f"{row.same_tokens:.1%}", f"{row.same_top:.2%}"]
        cells += ["n/a" if count is None else str(count) for count in (row.differ, row.words)]
        made.append(tuple(Cell(cell) for cell in cells))
    return markdown(Table("", columns, tuple(made)))


def page(rows: list[Row]) -> str:
    """Return the page: the table, what the columns mean, and the versions."""
    versions: dict[str, dict[str, str]] = {}
    for row in rows:
        versions.setdefault(NAMES[row.loader], {}).update(row.versions)
    said = "\n".join(f"- {n}: {', '.join(f'{k} {v}' for k, v in found.items())}" for n, found in versions.items())
    return (
        "# What loads where\n\n"
        "SmolLM2-135M-Instruct in every format, scored by each loader in an environment without quantforge, on "
        f"{WINDOWS} windows of {SEQ_LEN} tokens of the set `python-docs` (evaluation part) and {PROMPTS} greedy texts "
        f"of {NEW_TOKENS} tokens. Transformers computes in float32 (4-bit floats and NF4 in bfloat16) and must give "
        "the same tokens, equal dequantized weights and perplexity within 0.1 %; vLLM and llama.cpp round activations: "
        "perplexity within 0.5 % of ours in bfloat16, and the most probable token of ours in float32 in at "
        f"least 97 % of places.\n\n{table(rows)}\n\n{said}\n- ours: quantforge {version('quantforge')}, torch "
        f"{torch.__version__}\n\n{WHY}\n\nMade by `make interop`.\n"
    )


def main(environments: Path, only: set[str]) -> None:
    """Make the checkpoints, run the loaders, write `reports/interop`."""
    present = {name for name in SCRIPTS if (environments / name / "bin" / "python").exists()}
    for name in sorted(set(SCRIPTS) - present):
        print(f"no environment {environments / name}: {NAMES[name]} is left out", file=sys.stderr)
    source = load.find(None)
    tokenizer = load.tokenizer(source)
    text = corpus.load_text("python-docs", "evaluation")
    windows = corpus.windows(text, tokenizer, SEQ_LEN, WINDOWS).ids
    prompts = windows[:PROMPTS, :64].contiguous()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        for checkpoint in CHECKPOINTS:
            loaders = [name for name in checkpoint.loaders if name in present]
            if not loaders or (only and checkpoint.name not in only):
                continue
            folder = Path(place, checkpoint.name)
            result = quantforge.quantize(None, **checkpoint.options, out=folder)
            ours = {}
            if "stock" in loaders:
                model = quantforge.load(folder, checkpoint.dtype, packed=False)
                ours["stock"] = score(model, windows, prompts)
            if set(loaders) - {"stock"}:
                rounded = score(quantforge.load(folder, torch.bfloat16, packed=False), windows, prompts).perplexity
                exact = score(quantforge.load(folder, torch.float32, packed=False), windows, prompts)
                ours |= dict.fromkeys(("vllm", "llamacpp"), replace(exact, perplexity=rounded))
            expected = {
                "windows": windows.tolist(),
                "prompts": prompts.tolist(),
                "new_tokens": NEW_TOKENS,
                "dtype": str(checkpoint.dtype).removeprefix("torch."),
                "digests": digests(result.layers, checkpoint.dtype),
                "words": {word: tokenizer(word, add_special_tokens=False).input_ids for word in WORDS},
            }
            file = Path(place, f"{checkpoint.name}.json")
            file.write_text(json.dumps(expected))
            for loader in loaders:
                python = (environments / loader / "bin" / "python").absolute()
                found, error, seconds = run(python, SCRIPTS[loader], folder, file)
                rows.append(compare(checkpoint, loader, found, ours[loader], seconds, error))
                print(rows[-1].line(), file=sys.stderr)
    print(table(rows))
    file = REPORTS / "interop.json"
    if only and file.exists():
        known = [Row(**row) for row in json.loads(file.read_text())]
        new = {(row.checkpoint, row.loader): row for row in rows}
        rows = [new.get((row.checkpoint, row.loader), row) for row in known]
    elif only or len(present) < len(SCRIPTS):
        sys.exit("not the whole table, so nothing is written")
    REPORTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    (REPORTS / "README.md").write_text(page(rows))
    sys.exit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", type=Path)
    parser.add_argument("--only", default="", help="names of checkpoints, by commas")
    asked = parser.parse_args()
    main(asked.environments, set(filter(None, asked.only.split(","))))
