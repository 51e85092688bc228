"""Makes records to show: plain ones, hostile ones, and ones with everything that a report can hold."""

from __future__ import annotations

import dataclasses
import math
import random
from functools import cache
from html.parser import HTMLParser

from quantforge.record import SCHEMA, DivergenceRow, Histogram, LayerRow, Origin, Report, Run, TaskRow

WINDOWS, BINS = 48, 96
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip
VOID = {"meta", "link", "br", "hr", "img", "input"}
SOME = ("sentence_completion", "word_completion", "anaphor_gender_agreement", "ellipsis_n_bar_1", "wh_island")


def layer(kind: str = "q_proj", block: int | None = 0, relative_loss: float = 0.01) -> LayerRow:
    name = f"model.layers.{block}.{kind}"
    return LayerRow(name, kind, block, (64, 32), "int4-g32", 4.5, 12.5, relative_loss, {"damp": 0.01, "rung": "damped"})


def a_run(label: str = "gptq-int4-g64", bits: int | None = 4, perplexity: float = 12.3456, **changes: object) -> Run:
    layers = tuple(layer(kind, block, 0.01 * (block + 1)) for block in range(3) for kind in ("q_proj", "down_proj"))
    run = Run(
        label, label.split("-")[0], bits, 16.0 if bits is None else bits + 0.3125, perplexity, 0.01234, 1.26, 2_500_000,
        123_456_789, "", {"damp_percent": 0.01}, () if bits is None else layers, (),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def a_report(*runs: Run, **changes: object) -> Report:
    quantized = (a_run(f"{method}-int{bits}", bits, 10 + 40 / bits) for method in ("rtn", "gptq") for bits in (2, 4, 8))
    runs = runs or (a_run("float", None, 10.0), *quantized)
    own = Origin(
        "tiny", ("a note",), {"set": "docs", "samples": 8}, {"tokens": 1024},
        {"processor": "cpu", "memory_bytes": 8_000_000_000}, {"torch": "2.0"}, "quantforge compare tiny", "2026-01-01",
    )  # fmt: skip
    return Report(SCHEMA, "One protocol for all.", (dataclasses.replace(own, **changes),), runs)


def hostile(text: str) -> Report:
    """Put `text` wherever a record has text, in two comparisons, with everything that a report can show."""
    row = dataclasses.replace(layer(), name=text, kind=text, format=text, notes={text: text, "tokens": 3})
    smooth = dataclasses.replace(row, notes={"widest_input": 3.0, "smoothed_to": 1.0})
    task = TaskRow(text, 0, "1101", 0.25, text, {text: 1.0})
    shape = Histogram(text, text, 1.0, (0.5, 0.5), (0.9, 0.1))
    more = {"losses": (3.0, 2.0, 3.5), "kls": (0.1, 0.2, 0.1), "tasks": (task,), "histograms": (shape,),
            "divergence": DivergenceRow(9, 0.1, 0.2, 0.5, 1, 2, 0.2, 0.1)}  # fmt: skip
    runs = tuple(
        a_run(label, 4, perplexity, method=text, disk_note=text, options={text: [text]}, layers=(row, smooth),
              notes=(text,), **more)
        for label, perplexity in ((text, 12.0), (text + "4", 13.0), ("rtn-int4", 14.0))
    )  # fmt: skip
    facts = {text: {text: text}}
    own = Origin(
        text, (text,), facts, facts | {"ids_sha256": text, "overlap": 0.5}, facts, {text: text}, text, text, text
    )
    other = dataclasses.replace(own, model=text + "2", created=text + "3")
    level, floor = a_run(text, None, 11.0, method=text, **more), a_run(text + "f", None, 11.0, method="fp", **more)
    uncompared = dataclasses.replace(runs[0], losses=(1.0,), tasks=())
    moved = (dataclasses.replace(run, origin=1) for run in (level, floor, *runs))
    return Report(2, text, (own, other), (level, floor, *runs, uncompared, *moved))


class Page(HTMLParser):
    """Parses a page strictly: records elements and attributes, fails on a tag that is not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> means something else in HTML than in XML")

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


@cache
def many() -> Report:
    """Twenty-five runs on thirty blocks of seven kinds: eight methods at three widths, and the float model."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    notes = {"damp": 0.15, "rung": "float32", "dead_columns": 0, "rows_rounded": 0}

    def rows(share: float) -> tuple[LayerRow, ...]:
        return tuple(
            LayerRow(f"model.layers.{block}.{kind}", kind.split(".")[1], block, (1536, 576), "int4-g64-asym-bf16",
                     4.3125, 1.163978409851552 * share, 0.0038453387045641113 * share, notes)
            for block in range(30) for kind in kinds
        )  # fmt: skip

    methods = ("rtn", "gptq", "gptq-v2", "awq", "hqq", "spqr", "quip", "omniquant")
    runs = tuple(
        a_run(f"{method}-int{bits}-g64-asym", bits, 10 + 30 * 3.0 ** -bits + i, method=method,
              layers=rows((i + 1) * 4.0 ** (2 - bits)))
        for i, method in enumerate(methods) for bits in (4, 3, 2)
    )  # fmt: skip
    return a_report(a_run("fp", None, 10.0), *runs)


def origin(model: str = "tiny-135m", tokens: str = "a", **evaluation: object) -> Origin:
    """Return a comparison on `tokens` of a text of 70,000 bytes."""
    return Origin(
        model, (f"{model} is made up",), {"name": "calib.txt", "count": 64},
        {"ids_sha256": tokens * 64, "seq_len": 512, "count": WINDOWS, "text_bytes": 70_000} | evaluation,
        {"processor": "cpu", "memory_bytes": 8_000_000_000}, {"torch": "2.9"}, f"quantforge compare {model}",
        "2026-01-01",
    )  # fmt: skip


def enriched(run: Run, excess: float, tasks: tuple[str, ...] = SOME, items: int = 200, histograms: int = 2) -> Run:
    """Give a run windows, divergence, answers and histograms that go with losing `excess` nats to the float model."""
    shared, own = random.Random(1), random.Random(run.label)
    base = math.log(run.perplexity) - excess if math.isfinite(run.perplexity) else 3.0
    hard = [shared.gauss(0, 0.15) for _ in range(WINDOWS)]
    middle = math.fsum(hard) / WINDOWS
    noise = [own.gauss(0, 0.25 * abs(excess) + 1e-4) for _ in range(WINDOWS)]
    drift = math.fsum(noise) / WINDOWS * 0.9
    losses = tuple(base + h - middle + excess + n - drift for h, n in zip(hard, noise, strict=True))
    kl = max(0.0, run.kl if math.isfinite(run.kl) else excess)
    kls = tuple(kl * (1 + own.gauss(0, 0.1)) for _ in range(WINDOWS))
    found = DivergenceRow(
        WINDOWS * 511, kl / 3, 12 * kl, max(0.3, 1 - 0.8 * math.sqrt(kl)), int(4000 * kl), int(2500 * kl), kl * 1.05,
        kl * 1.05 * 0.985,
    )  # fmt: skip
    return dataclasses.replace(
        run, losses=losses, kls=kls, divergence=found, perplexity=math.exp(math.fsum(losses) / WINDOWS),
        tasks=tuple(answers(name, items, excess, own) for name in tasks),
        tokens_per_second=3100.0 - 400 * (run.bits is not None),
        histograms=tuple(histogram(f"model.layers.{i}.{KINDS[i % 7]}", what, run.bits or 16, own)
                         for i in range(histograms if run.bits else 0) for what in ("weights", "inputs")),
    )  # fmt: skip


def answers(task: str, items: int, excess: float, own: random.Random) -> TaskRow:
    """Return answers of which a share of 0.82 is right before, and the fewer the larger `excess` is."""
    shared = random.Random(task)
    right = [shared.random() < 0.82 for _ in range(items)]
    right = [(not r) if own.random() < 0.25 * min(1.0, abs(excess)) * (1.0 if r else 0.3) else r for r in right]
    return TaskRow(
        task, 0, "".join(str(int(r)) for r in right), math.nan if task == "word_completion" else 0.5, task, {}
    )


def histogram(layer: str, what: str, bits: int, own: random.Random) -> Histogram:
    """Return a bell before, and after it what is left on a grid of `bits`."""
    width = 0.05 + 0.1 * own.random()
    bell = [math.exp(-(((i + 0.5) / BINS - 0.5) ** 2) / (2 * width**2)) + 1e-5 * own.random() for i in range(BINS)]
    total = math.fsum(bell)
    before = [value / total for value in bell]
    after, step = [0.0] * BINS, max(1, BINS // 2**bits)
    for i, value in enumerate(before):
        after[min(BINS - 1, (i // step) * step + step // 2)] += value
    return Histogram(layer, what, 0.123 if what == "weights" else 31.5, tuple(before), tuple(after))


def layers(blocks: int, share: float) -> tuple[LayerRow, ...]:
    """Return the seven layers of each block."""
    notes = {"damp": 0.01, "rung": "float32", "dead_columns": 0}
    return tuple(
        LayerRow(f"model.layers.{b}.{kind}", kind.split(".")[1], b, (1536, 576), "int4-g64-asym-bf16", 4.3125,
                 1.16397 * share, 0.0038453387 * share * (1 + 0.3 * math.sin(b + k)), notes)
        for b in range(blocks) for k, kind in enumerate(KINDS)
    )  # fmt: skip


def run(label: str, bits: int | None, excess: float, size: float, blocks: int = 4, **more: object) -> Run:
    """Return a run that loses `excess` nats to a float model of perplexity 28.8 and takes `size` megabytes."""
    method = label.split("-")[0]
    plain = Run(
        label, method, bits, 16.0 if bits is None else bits + 0.3125, 28.8 * math.exp(excess), 0.9 * abs(excess),
        0.0 if bits is None else 85.5, None if bits is None else 1_153_900_000, int(size * 1e6), "", {},
        () if bits is None else layers(blocks, 10 * excess), (),
    )  # fmt: skip
    return enriched(plain, excess, **more)


def rich(blocks: int = 4, **more: object) -> Report:
    """Return a report of one model with all that a page can show, and an overlap of the texts."""
    rows = (
        run("fp", None, 0.0, 269.0, **more),
        run("fp-bfloat16", None, 2e-4, 269.0, **more),
        run("rtn-int8-g64-asym", 8, 1e-4, 170.0, blocks, **more),
        run("rtn-int4-g64-asym", 4, 0.28, 114.0, blocks, **more),
        run("gptq-int4-g64-asym", 4, 0.085, 114.0, blocks, **more),
        run("awq-int4-g64-asym", 4, 0.088, 114.5, blocks, **more),
        run("gptq-int3-g64-asym", 3, 0.30, 103.5, blocks, **more),
        run("rtn-int3-g64-asym", 3, 1.2, 103.5, blocks, **more),
    )  # fmt: skip
    return Report(2, "One protocol for all.", (origin(overlap=0.042),), rows)


def two_models() -> Report:
    """Return a report of two models with different tokenizers, measured on two machines."""
    second = dataclasses.replace(origin("other-360m", "b"), machine={"accelerator": "H200"})
    first = rich()
    larger = (
        run("fp", None, 0.0, 720.0),
        run("gptq-int4-g64-asym", 4, 0.05, 260.0),
        run("rtn-int4-g64-asym", 4, 0.2, 255.0),
    )
    moved = (
        dataclasses.replace(
            r, origin=1, losses=tuple(x - 0.3 for x in r.losses), perplexity=r.perplexity * math.exp(-0.3)
        )
        for r in larger
    )
    return dataclasses.replace(first, origins=(*first.origins, second), runs=(*first.runs, *moved))
