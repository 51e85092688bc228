"""What moves GPTQ's perplexity at equal bits: variants of damping, order, ranges, token weights and targets.

    python tools/gptq_study.py MODEL TEXT.txt --out reports/raw/gptq-study.jsonl --bits 3 --damp 0.15 ...

calibrates on the first 64 windows of 512 tokens and scores windows 65 to 112 of the same text (and, with --test FILE,
48 windows of another), appending one JSON line. The variants that earned their place are options of the gptq solver;
the others live here only, so that their figures can be remade. `--table LINES.jsonl` prints the lines as a table.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from quantforge.calibrate import corpus
from quantforge.calibrate.stats import Hessian
from quantforge.evaluation import perplexity
from quantforge.models import arch, load
from quantforge.models.walk import walk
from quantforge.numerics import ranges
from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.ranges import Range
from quantforge.solvers.sweep import inverse_factor, sweep

SAMPLES, SEQ_LEN, WINDOWS = 64, 512, 48


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--test", help="another text to score")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--damping", choices=["relative", "mean"], default="relative")
    parser.add_argument("--damp", type=float, default=0.15)
    parser.add_argument("--order", choices=["act", "group"], default="act", help="columns, or whole groups, by diag(H)")
    parser.add_argument("--range", choices=["minmax", "mse", "diagonal", "hessian"], default="hessian")
    parser.add_argument("--fresh", choices=["no", "fit", "search"], default="no", help="ranges from updated columns")
    parser.add_argument("--token-weight", type=float, default=0.0, help="o and down: weigh tokens by 1 / |h|^this")
    parser.add_argument(
        "--asymmetric", type=float, default=0.0, help="share of the earlier layers' error to make up for"
    )
    return parser.parse_args()


def fit(w: Tensor, fmt: Format, rule: str, cost: Tensor) -> Range:
    """Return the range of `w` [rows, cols] by a named rule."""
    if rule == "minmax":
        return ranges.minmax(w, fmt)
    return ranges.mse(w, fmt, None if rule == "mse" else cost, grid=20, max_shrink=0.5)


def search(w: Tensor, u: Tensor, fmt: Format, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Choose each row's scale and zero point for one group, w [cols, rows], by sweeping each candidate through."""
    pairs = [(c, z) for c in (0.9, 0.95, 1.0, 1.05, 1.1) for z in (-1, 0, 1)]
    scale = torch.stack([ranges.stored(start[0] * c, fmt.scale) for c, _ in pairs])
    zero = torch.stack([(start[1] + z).clamp(fmt.grid.low, fmt.grid.high) for _, z in pairs])
    total = torch.zeros(scale.numel())

    def rounded(j: int, column: Tensor) -> Tensor:
        out = ranges.round_to(column, scale.view(-1), zero.view(-1), fmt)
        total.add_(((column - out) / u[j, j]).square_())
        return out

    sweep(w[:, None].expand(-1, len(pairs), -1).reshape(len(w), -1).clone(), u, rounded)
    best = total.view(len(pairs), -1).argmin(0)[None]
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


def solve(weight: Tensor, target: Tensor, h: Tensor, fmt: Format, o: argparse.Namespace) -> Tensor:
    """Return Ŵ [out, in] for `target`, row by row no worse than plain rounding of `weight`."""
    size, group = weight.shape[1], o.group_size
    energy = h.diagonal()
    if o.order == "act":
        order = energy.argsort(descending=True)
    else:
        by_group = energy.view(-1, group)
        inside = by_group.argsort(dim=1, descending=True)
        order = torch.cat([g * group + inside[g] for g in by_group.amax(1).argsort(descending=True)])
    u = inverse_factor(h, o.damp, order, relative=o.damping == "relative").u
    cost = energy.clone()
    if o.range == "hessian":
        cost[order] = u.diagonal() ** -2
    fitted = fit(target, fmt, o.range, cost)
    scale, zero = fitted.scale.T.contiguous(), fitted.zero.T.contiguous()
    wt = target.T[order].clone()

    def rounded(j: int, column: Tensor) -> Tensor:
        g = int(order[j]) // group
        if o.fresh != "no" and j % group == 0:
            columns = order[j : j + group]
            now = fit(wt[j : j + group].T, fmt, o.range, cost[columns])
            scale[g], zero[g] = now.scale[:, 0], now.zero[:, 0]
            if o.fresh == "search":
                scale[g], zero[g] = search(wt[j : j + group], u[j : j + group, j : j + group], fmt, (scale[g], zero[g]))
        return ranges.round_to(column, scale[g], zero[g], fmt)

    sweep(wt, u, rounded, block_size=128)
    solved = torch.empty_like(weight)
    solved[:, order] = wt.T
    shape = (weight.shape[0], size)
    plain = ranges.round_to(weight, spread(fitted.scale, shape, fmt.block), spread(fitted.zero, shape, fmt.block), fmt)
    losses = [((e @ h) * e).sum(1) for e in (weight - solved, weight - plain)]
    return solved if o.asymmetric else torch.where((losses[0] <= losses[1])[:, None], solved, plain)


class Study:
    """The statistics of one walk: Hessians, and for asymmetric targets the float inputs beside the quantized ones."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        self.hessians: dict[int, Hessian] = {}
        self.float_inputs: dict[tuple[int, int], Tensor] = {}
        self.drift: dict[int, Tensor] = {}
        self.residual: dict[object, Tensor] = {}

    def observe(self, index: int, batch: int, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        if self.o.asymmetric:
            other = self.float_inputs.pop((index, batch))
            total = self.drift.setdefault(index, torch.zeros(x.shape[1], x.shape[1]))
            total.addmm_((other - x).T, x)
        if self.o.token_weight and index % 4 in (1, 3):
            h = self.residual[batch].reshape(len(x), -1)
            weights = h.square().mean(1).add(1e-6).pow(-self.o.token_weight / 2)
            x = x * (weights / weights.mean()).sqrt()[:, None]
        self.hessians.setdefault(index, Hessian(x.shape[1])).add(x)

    def observe_float(self, index: int, batch: int, x: Tensor) -> None:
        self.float_inputs[index, batch] = x.reshape(-1, x.shape[-1])


def target_of(weight: Tensor, h: Tensor, drift: Tensor, share: float) -> Tensor:
    """Return W + share · W C H⁻¹ with C = Σ (x̃ − x) xᵀ: what makes up for the inputs' error (GPTAQ, section 6)."""
    damped = h.clone()
    damped.diagonal().mul_(1.1).add_(1e-4 * damped.diagonal().mean())
    return weight + share * torch.linalg.solve(damped, (weight @ drift).T).T


COLUMNS = {
    "bits": "bits",
    "damping": "damping",
    "damp": "share",
    "range": "range",
    "order": "order",
    "fresh": "fresh ranges",
    "token_weight": "token weight",
    "asymmetric": "asymmetric",
    "validation": "perplexity, windows 65-112",
    "test": "perplexity, test",
    "seconds": "seconds",
}


def table(lines: Path) -> str:
    """Return the recorded runs as a Markdown table, best first within each number of bits."""
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda r: (-r["bits"], r["validation"]))
    head = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join(head + ["| " + " | ".join(str(r.get(k, "")) for k in COLUMNS) + " |" for r in rows])


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--table":
        print(table(Path(sys.argv[2])))
        return
    o = options()
    torch.set_grad_enabled(False)
    source = load.find(o.model)
    tokenizer = load.tokenizer(source)
    ids = corpus.windows(corpus.load_text(o.text, "calibration"), tokenizer, SEQ_LEN, SAMPLES + 1 + WINDOWS).ids
    model = load.model(source)
    stages = arch.find_stages(model)[0]
    fmt = parse(f"int{o.bits}-g{o.group_size}-asym").with_scale(source.dtype)
    batches = torch.split(ids[:SAMPLES], 4)
    study = Study(o)
    start = time.perf_counter()
    ahead = iter(())
    if o.asymmetric:
        twin = copy.deepcopy(model)
        other = arch.find_stages(twin)[0]
        ahead = walk(lambda b: twin.base_model(input_ids=b, use_cache=False), batches, other, study.observe_float)
        next(ahead)
    if o.token_weight:
        keep_residuals(model, study, len(batches))
    scale = 2 / (SAMPLES * SEQ_LEN)
    for index in walk(lambda b: model.base_model(input_ids=b, use_cache=False), batches, stages, study.observe):
        h = study.hessians.pop(index).value()
        modules = stages[index].modules
        weight = torch.cat([arch.get_weight(m) for m in modules])
        target = weight
        if o.asymmetric:
            target = target_of(weight, h, study.drift.pop(index) * scale, o.asymmetric)
            next(ahead, None)
        solved = solve(weight, target, h, fmt, o)
        for module, rows in zip(modules, solved.split([m.weight.shape[0] for m in modules]), strict=True):
            arch.set_weight(module, rows)
    record = {k: v for k, v in vars(o).items() if k not in ("model", "text", "test", "out")}
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["validation"] = round(perplexity.evaluate(model, ids[SAMPLES + 1 :]).perplexity, 3)
    if o.test:
        test = corpus.windows(corpus.load_text(o.test, "evaluation"), tokenizer, SEQ_LEN, WINDOWS).ids
        record["test"] = round(perplexity.evaluate(model, test).perplexity, 3)
    line = json.dumps(record)
    if o.out:
        with o.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def keep_residuals(model: torch.nn.Module, study: Study, count: int) -> None:
    """Remember, for each batch, the residual stream that the next output projection will add to."""
    from greenlet import getcurrent

    order: dict[int, int] = {}

    def remember(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        batch = order.setdefault(id(getcurrent()), len(order))
        study.residual[batch] = args[0]

    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(remember)
        layer.post_attention_layernorm.register_forward_pre_hook(remember)


if __name__ == "__main__":
    main()
