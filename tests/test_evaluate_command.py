"""`quantforge evaluate` with tasks and whole documents, end to end on the trained tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

import quantforge
from quantforge import api, cli
from quantforge.calibrate import corpus
from quantforge.errors import DataError, ModelError, RecipeError
from quantforge.evaluation import rolling, zeroshot
from quantforge.models import load as loading
from quantforge.models import tiny

TINY = Path(__file__).parent / "data" / "tiny-llama"
SMOKE = zeroshot.SUITES["smoke"]


def run(*args: object) -> Result:
    """Run the command line in this process; an exception that is no clean exit is raised."""
    result = CliRunner().invoke(cli.main, ["evaluate", *(str(a) for a in args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """Return a checkpoint at 2 bits, which has forgotten much."""
    out = tmp_path_factory.mktemp("quantized") / "two"
    quantforge.quantize(TINY, "rtn", bits=2, group_size=128, out=out)
    return out


@pytest.fixture
def code(tmp_path) -> Path:
    """Return a folder of one task that the tiny model can do: which of two lines has its letters in place."""
    text = corpus.load_text("python-docs", "evaluation").text
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 40][:24]
    rows = [{"good": line[:40], "bad": f"{line[:20]}{line[20:22][::-1]}{line[22:40]}"} for line in lines]
    task = {
        "task": "lines",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "lines.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
    }
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return tmp_path


def scored(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_the_smoke_suite_prints_a_line_for_each_task(quantized):
    result = run(quantized, "--suite", "smoke", "--limit", 8)
    assert result.exit_code == 0, result.stderr
    title, head, *rows, mean = result.stdout.splitlines()
    assert title == "two, right answers:"
    for column in ("task", "shots", "items", "accuracy", "95 % interval", "standard error", "chance", "p above chance"):
        assert column in head
    assert [row.split()[:3] for row in rows] == [[name, "0", "8"] for name in SMOKE]
    assert [row.split()[-2] for row in rows] == ["50.0%", "-", "25.0%"]
    assert len({len(row) for row in (head, *rows)}) == 1
    assert mean.startswith("mean of 3 tasks ")
    found = scored(quantized, "--suite", "smoke", "--limit", 8)
    shares = [task["accuracy"] for task in found["tasks"]]
    told = found["tasks_mean"]["share"]
    assert told["low"] < told["value"] == pytest.approx(sum(shares) / 3)
    assert f" {told['value']:.1%}  {told['low']:.1%} to {told['high']:.1%} " in mean


def test_json_has_every_answer_and_a_digest_by_which_runs_can_be_paired(code, quantized):
    found = {model: scored(model, "--task-dir", code) for model in (TINY, quantized)}
    (float_task,), (two_bits,) = (found[model]["tasks"] for model in found)
    assert float_task["task"] == "lines"
    assert float_task["items"] == len(float_task["answers"]) == 24
    assert set(float_task["answers"]) <= {"0", "1"}
    assert float_task["accuracy"] == float_task["answers"].count("1") / 24
    assert float_task["low"] < float_task["accuracy"] <= float_task["high"]
    assert float_task["accuracy"] > two_bits["accuracy"]
    assert float_task["p"] < 1e-3
    assert float_task["digest"] == two_bits["digest"]
    assert float_task["answers"] != two_bits["answers"]
    assert found[TINY]["perplexity"] is None
    assert found[TINY]["tasks_mean"] is None
    assert scored(TINY, "--task-dir", code) == found[TINY]


def test_tasks_are_named_limited_and_given_examples(code):
    (found,) = scored(TINY, "--task-dir", code, "--tasks", "lines", "--limit", 5, "--shots", 2, "--batch-size", 2)[
        "tasks"
    ]
    assert (found["shots"], found["items"]) == (2, 5)
    other = scored(TINY, "--task-dir", code, "--tasks", "lines", "--limit", 5, "--shots", 2, "--seed", 1)["tasks"][0]
    assert other["digest"] != found["digest"]


def test_rolling_prints_figures_per_word_and_per_byte(quantized):
    result = run(quantized, "--rolling", "--windows", 4, "--seq-len", 64)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("two: word perplexity ")
    for part in (", byte perplexity ", "bits per byte", ", token perplexity ", " words, ", "in windows of 64\n"):
        assert part in result.stdout
    assert result.stdout.count(" (95 %: ") == 4
    found = scored(quantized, "--rolling", "--windows", 4, "--seq-len", 64)["rolling"]
    low, high = found["intervals"]["word_perplexity"]
    assert low < found["word_perplexity"] < high
    assert 4 * 64 - 20 < found["tokens"] <= 4 * 64
    assert found["word_perplexity"] == pytest.approx(found["byte_perplexity"] ** (found["bytes"] / found["words"]))


def test_through_a_cache_perplexity_has_its_interval_too(quantized):
    wish = (quantized, "--windows", 8, "--seq-len", 32, "--kv", "int4-token")
    found = scored(*wish)
    low, high = found["interval"]
    assert low < found["perplexity"] < high
    assert f"token perplexity {found['perplexity']:.3f} (95 %: {low:.3f} to {high:.3f}) on " in run(*wish).stdout


def test_text_that_a_checkpoint_was_calibrated_on_is_told(tmp_path):
    texts = corpus.load_text("python-docs", "calibration").text
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_text(texts[:4000], encoding="utf-8")
    other.write_text(texts[4000:8000], encoding="utf-8")
    for method in ("gptq", "rtn"):
        out = tmp_path / method
        quantforge.quantize(TINY, method, group_size=64, calibration=same, samples=4, seq_len=32, out=out)
    wish = ("--windows", 2, "--seq-len", 32)
    for more in ((), ("--rolling",), ("--kv", "int8-token")):
        result = run(tmp_path / "gptq", "--data", same, *wish, *more, "--json")
        assert result.stderr.startswith("warning: overlap: ")
        assert result.stderr.count("\n") == 1
        assert json.loads(result.stdout)["warnings"] == [result.stderr.removeprefix("warning: ").strip()]
    assert scored(tmp_path / "gptq", "--data", other, *wish)["warnings"] == []
    assert scored(tmp_path / "rtn", "--data", same, *wish)["warnings"] == []


def test_names_from_files_do_not_steer_the_terminal(code, tmp_path):
    odd = tmp_path / "e\x1b[31m.txt"
    odd.write_text("Words of a text, and some more. " * 20)
    task = yaml.safe_load((code / "lines.yaml").read_text()) | {"task": "li\x1b[31mnes"}
    (code / "lines.yaml").write_text(yaml.safe_dump(task))
    wish = (TINY, "--data", odd, "--windows", 2, "--seq-len", 32)
    for words in (wish, (*wish, "--rolling"), (TINY, "--task-dir", code, "--limit", 1)):
        result = CliRunner().invoke(cli.main, ["evaluate", *map(str, words)], color=True)
        assert result.exit_code == 0, result.output
        assert "\\x1b[31m" in result.stdout
        assert "\x1b" not in result.stdout
    assert "nan" not in result.stdout  # one item has no standard error


def test_each_line_of_jsonl_is_a_document_of_its_own(tmp_path):
    file = tmp_path / "some.jsonl"
    texts = ["The first document.", "  ", "A second one, which is longer."]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = api.evaluate(TINY, data=file, rolling=True, windows=None)
    model, tokenizer = loading.model(loading.find(str(TINY))), loading.read_tokenizer(TINY)
    assert found.rolling == rolling.evaluate(model, tokenizer, [texts[0], texts[2]], window=512, batch_size=8)
    assert math.isnan(found.perplexity)
    assert found.data["name"] == str(file)


@pytest.mark.parametrize("inputs", ["int8-tensor", "int8-token"])
def test_texts_of_a_batch_do_not_change_each_other_where_tokens_share_a_range(code, inputs, monkeypatch):
    """Such models are scored one text at a time, whatever batch is asked for; others in batches."""
    result = quantforge.quantize(TINY, "rtn", bits=8, inputs=inputs)
    sizes: list[int] = []
    harness = zeroshot.make_harness

    def watch(model: Any, tokenizer: Any, batch_size: int, *more: Any) -> Any:
        sizes.append(batch_size)
        return harness(model, tokenizer, batch_size, *more)

    monkeypatch.setattr(zeroshot, "make_harness", watch)
    tokenizer = loading.read_tokenizer(TINY)
    text = "int8-tensor"
    eight = api.evaluate(result.model, tokenizer=tokenizer, task_dirs=[code], batch_size=8)
    one = api.evaluate(result.model, tokenizer=tokenizer, task_dirs=[code], batch_size=1)
    assert sizes == ([1, 1] if inputs == text else [8, 1])
    assert eight.tasks[0].answers == one.tasks[0].answers
    api.evaluate(result.model, tokenizer=tokenizer, rolling=True, windows=1, seq_len=32)
    assert sizes[2:] == [1 if inputs == text else 8]


@pytest.mark.parametrize(
    ("options", "code_number", "message"),
    [
        (("--suite", "smok"), 2, "did you mean 'smoke'?"),
        (("--tasks", "quantforge_pair"), 4, "did you mean 'quantforge_pairs'?"),
        (("--task-dir", "nowhere"), 4, "no folder of tasks 'nowhere'"),
        (("--suite", "smoke", "--rolling"), 2, "leave out rolling"),
        (("--suite", "smoke", "--kv", "int8-token"), 2, "leave out kv"),
        (("--rolling", "--kv", "int8-token"), 2, "leave out kv or rolling"),
        (("--shots", "2"), 2, "add --tasks or --suite smoke"),
        (("--limit", "2"), 2, "add --tasks or --suite smoke"),
        (("--limit", "0"), 2, "--limit"),
        (("--suite", "smoke", "--shots", "400"), 4, "quantforge_pairs.yaml has 346 examples to draw from, 400"),
        (("--rolling", "--seq-len", "4000"), 2, "seq_len 4000 is more than the 512 positions"),
        (("--rolling", "--data", "nothing.txt"), 4, "does not exist"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_read(options, code_number, message, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *args: pytest.fail("the model was read"))
    result = run(TINY, *options)
    assert result.exit_code == code_number, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_model_in_memory_needs_a_tokenizer_that_fits_it():
    model = tiny.make("llama")
    with pytest.raises(DataError, match="tasks need a tokenizer"):
        api.evaluate(model, suite="smoke", limit=2)
    with pytest.raises(DataError, match="documents need a tokenizer"):
        api.evaluate(model, rolling=True)
    with pytest.raises(ModelError, match="beyond the 128 rows of the embedding"):
        api.evaluate(model, suite="smoke", limit=2, tokenizer=loading.read_tokenizer(TINY))
    with pytest.raises(DataError, match="words and bytes are counted in text"):
        api.evaluate(model, rolling=True, data=torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(RecipeError, match="leave out rolling"):
        api.evaluate(model, suite="smoke", rolling=True)


def test_minimal_pairs_as_blimp_has_them_become_a_folder_of_tasks(tmp_path):
    import importlib.util

    path = Path(__file__).parent.parent / "tools" / "blimp_tasks.py"
    if not path.exists():
        pytest.skip("made for the source tree")
    spec = importlib.util.spec_from_file_location("blimp_tasks", path)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("agreement", "order"):
        pair = {"sentence_good": f"The {name} holds.", "sentence_bad": f"Holds {name} the.", "UID": name}
        (data / f"{name}.jsonl").write_text("\n".join([json.dumps(pair)] * 3))
    assert tool.write(data, out) == ["blimp_agreement", "blimp_order"]
    found = api.evaluate(TINY, tasks=["blimp"], task_dirs=[out])
    assert [(score.task, score.summary.items, score.shots) for score in found.tasks] == [
        ("blimp_agreement", 3, 0),
        ("blimp_order", 3, 0),
    ]
    assert found == api.evaluate(TINY, task_dirs=[out])
