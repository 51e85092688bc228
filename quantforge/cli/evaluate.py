"""`quantforge evaluate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantforge.calibrate.text_files import Reading
from quantforge.cli.options import (
    machine,
    parse_list,
    print_result,
    print_warning,
    tasks_options,
    text_files,
    windows_option,
)
from quantforge.errors import clean

if TYPE_CHECKING:
    from quantforge.api import Against, Evaluation
    from quantforge.evaluation.rolling import RollingScore
    from quantforge.evaluation.significance import Interval, Mean
    from quantforge.evaluation.zeroshot import TaskScore


@click.command()
@click.argument("model", required=False)
@click.option("--data", default="python-docs", show_default=True, metavar="SET|FILE", help="Evaluation text.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@windows_option
@click.option("--kv", metavar="FORMAT", help="Decode through a cache stored so, e.g. int8-token, int4-kivi-g32-w32.")
@click.option("--against", metavar="MODEL", help="A float model, or demo: how far predictions diverge from its.")
@click.option("--rolling", is_flag=True, help="Word and byte perplexity of whole documents, as lm-eval has them.")
@tasks_options
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of --shots.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="With tasks or --rolling.")
@text_files
@machine
def evaluate(
    model: str | None,
    data: str,
    seq_len: int,
    windows: int,
    kv: str | None,
    against: str | None,
    rolling: bool,
    tasks: str,
    suite: str | None,
    task_dirs: tuple[Path, ...],
    shots: int | None,
    limit: int | None,
    seed: int,
    batch_size: int,
    encoding: str,
    errors: str,
    bad_lines: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Print the perplexity of MODEL, or what it scores on tasks: a float model, or a quantized checkpoint.

    Perplexity is per token over windows of --seq-len tokens, as papers have it; with --rolling per word and per byte,
    as lm-eval has it. With --tasks, --suite or --task-dir only tasks are scored.
    """
    import quantforge

    found = quantforge.evaluate(
        model,
        data=data,
        seq_len=seq_len,
        windows=windows or None,
        kv=kv,
        against=against,
        rolling=rolling,
        tasks=parse_list(tasks),
        suite=suite,
        task_dirs=task_dirs,
        shots=shots,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
        reading=Reading(encoding, errors, bad_lines),
        trust_remote_code=trust_remote_code,
    )
    for line in found.warnings:
        print_warning(line)
    print_result(json.dumps(found.record()) if as_json else _text(found))


def _text(found: Evaluation) -> str:
    if found.tasks:
        return f"{found.model}, right answers:\n{_table(found.tasks, found.tasks_mean)}"
    if found.rolling is not None:
        return _rolled(found.model, clean(found.data["name"]), found.rolling)
    through = "" if found.kv is None else f", decoded through a cache of {found.bytes_per_token:,.0f} bytes a token"
    on = f"{found.data.get('count')} x {found.data['seq_len']} tokens of {clean(found.data['name'])}"
    line = f"{found.model}: token perplexity {found.perplexity:.3f}{_between(found.interval)} on {on}{through}"
    return line if found.against is None else f"{line}\n{_compared(found.against, len(found.losses))}"


def _rolled(model: str, data: str, score: RollingScore) -> str:
    digits = {"word_perplexity": 3, "byte_perplexity": 4, "bits_per_byte": 4, "token_perplexity": 3}
    found = score.intervals()
    said = {name: f"{found[name].value:.{n}f}{_between(found[name], n)}" for name, n in digits.items()}
    return (
        f"{model}: word perplexity {said['word_perplexity']}, byte perplexity {said['byte_perplexity']}, bits per byte "
        f"{said['bits_per_byte']}, token perplexity {said['token_perplexity']}, rolling over {sum(score.words):,} "
        f"words, {sum(score.bytes):,} bytes, {sum(score.tokens):,} tokens of {data} in windows of {score.window}"
    )


def _between(interval: Interval, digits: int = 3) -> str:
    """Return an interval in brackets; nothing where it is not known."""
    if math.isnan(interval.low):
        return ""
    return f" (95 %: {interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _few(windows: int) -> str:
    """Say so where no difference could be shown, whatever it is: n windows have one sign by chance in 2 of 2ⁿ cases."""
    return "; too few windows to show any" if windows < 6 else ""


def _compared(found: Against, windows: int) -> str:
    ratio, kl, tokens, gap = found.ratio, found.kl, found.divergence, found.gap
    missed = ""
    if gap is not None and math.isfinite(gap.share):
        missed = f" (it misses {max(gap.share, 0):.1%} of the dense KL in the first {min(windows, 4)} windows)"
    return (
        f"against {found.model} ({found.perplexity:.3f}): perplexity x {ratio.value:.4f} "
        f"[{ratio.low:.4f}, {ratio.high:.4f}], "
        f"{found.verdict} (p = {found.p:.2g}{_few(windows)})\n"
        f"KL at least {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}] nats per token{missed}, median {tokens.median:.4f}, "
        f"99 % of tokens up to {tokens.p99:.3f}; the same token first in {tokens.agreement:.1%}; "
        f"{tokens.lost:,} right ones lost, {tokens.gained:,} gained of {tokens.tokens:,}"
    )


def _share(share: Interval, error: float) -> tuple[str, str, str]:
    """Return a share, its interval and its standard error in percent."""
    known = "-" if math.isnan(error) else f"{error:.1%}"
    return f"{share.value:.1%}", f"{share.low:.1%} to {share.high:.1%}", known


def _table(scores: tuple[TaskScore, ...], mean: Mean | None) -> str:
    """Return a line for each task, in columns, and one for their mean."""
    rows = [("task", "shots", "items", "accuracy", "95 % interval", "standard error", "chance", "p above chance")]
    for score in scores:
        found = score.summary
        guess = ("-", "-") if math.isnan(found.chance) else (f"{found.chance:.1%}", f"{found.p:.2g}")
        rows.append((clean(score.task), str(score.shots), str(found.items), *_share(found.share, found.error), *guess))
    if mean is not None:
        rows.append((f"mean of {len(scores)} tasks", "", "", *_share(mean.share, mean.error), "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
