"""The page of training runs says what the runs beside it say."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from quantforge.training import results
from quantforge.training.results import Training

ROOT = Path(__file__).parent.parent
_SPEC = spec_from_file_location("distillation", ROOT / "tools" / "distillation.py")
distillation = module_from_spec(_SPEC)
_SPEC.loader.exec_module(distillation)


def runs() -> list[tuple[str, Training]]:
    files = sorted((ROOT / "reports" / "distillation").glob("*/training.json"))
    return [(file.parent.name, results.from_json(file.read_text(encoding="utf-8"))) for file in files]


def test_the_committed_page_is_what_the_tool_makes_of_the_committed_runs():
    assert (ROOT / "reports" / "distillation" / "README.md").read_text(encoding="utf-8") == distillation.page(runs())


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, "as said"), (0.2, 0.1, "not here"), (1, 1, "not here")]
)
def test_what_a_paper_says_is_confirmed_by_the_figures_alone(low, high, verdict):
    run = runs()[0][1]
    texts = results.Texts(prompts=4, new=8, student_nll=1, teacher_nll=1, distinct=0.5, of_teacher=0.5, excess=low)
    one = replace(run, aim={**run.aim, "loss": "minillm"}, texts=texts)
    other = replace(run, aim={**run.aim, "loss": "fkl"}, texts=replace(texts, excess=high))
    line = next(x for x in distillation.said([one, other]).splitlines() if "ExAccErr" in x and x.startswith("|"))
    assert f"{low:.4g} (minillm) and {high:.4g} (fkl)" in line
    assert verdict in line


def test_the_readme_shows_the_figures_of_the_committed_runs():
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    found = dict(runs())
    for name in ("rtn3", "rtn3-self", "gptq3", "qlora-nf4"):
        assert f"| {found[name].before.perplexity:.1f} | {found[name].after.perplexity:.1f} |" in shown, name
    adapters, whole = (found[name].peak_memory / 1e9 for name in ("qlora-nf4", "full"))
    assert f"took {adapters:.2f} GB at their peak, all weights without it {whole:.2f} GB" in shown
