"""Task files are data: they run nothing, reach nothing outside of their folder, and a bad item is named by its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantforge.errors import DataError
from quantforge.evaluation import tasks
from quantforge.evaluation.zeroshot import SUITES

CHOICE = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl", "train": "more.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}",
    "doc_to_choice": "answers",
    "doc_to_target": "label",
}
OPEN = {k: v for k, v in CHOICE.items() if k != "doc_to_choice"} | {
    "output_type": "loglikelihood",
    "doc_to_target": " {{word}}",
}
ROW = {"question": "two", "answers": ["2", "3"], "label": 0, "word": "2"}


def write(folder: Path, raw: dict[str, Any], rows: list[Any] = [ROW, ROW], name: str = "mine.yaml") -> Path:  # noqa: B006
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "items.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "more.jsonl").write_text(json.dumps(ROW | {"question": "more"}), encoding="utf-8")
    (folder / name).write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder


def read(folder: Path, shots: int | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the configuration for lm-eval of the task `mine`, and its items."""
    config = tasks.config(tasks.read_folder(folder).tasks["mine"], shots)
    return config, list(config["custom_dataset"]()["test"])


def refused(folder: Path, raw: dict[str, Any], rows: list[Any] = [ROW]) -> str:  # noqa: B006
    with pytest.raises(DataError) as error:
        read(write(folder, raw, rows))
    assert error.value.exit_code == 4
    return str(error.value)


def test_the_suite_is_three_tasks_of_our_own_with_enough_items():
    folder = tasks.read_folder(tasks.own_folder())
    assert set(SUITES["smoke"]) == set(folder.tasks)
    assert [task.name for task in folder.find("quantforge_smoke")] == list(SUITES["smoke"])
    counts = [len(tasks.config(folder.tasks[name])["custom_dataset"]()["test"]) for name in SUITES["smoke"]]
    assert counts[0] >= 300
    assert min(counts) >= 150


def test_items_are_finished_by_the_templates(tmp_path):
    config, items = read(write(tmp_path, CHOICE, [ROW, ROW | {"label": "3"}, ROW | {"label": "1", "question": "x"}]))
    assert [item["text"] for item in items] == ["Q: two", "Q: two", "Q: x"]
    assert [item["target"] for item in items] == [0, 1, 1]
    assert items[0]["choices"] == ["2", "3"]
    assert config["num_fewshot"] == 0
    _, items = read(write(tmp_path, OPEN))
    assert items[0]["target"] == " 2"


@pytest.mark.parametrize("choices", ["{{[word, question]}}", ["2", "two"], {"a": "2", "b": "two"}])
def test_choices_are_a_field_a_template_or_stand_in_the_task(tmp_path, choices):
    _, items = read(write(tmp_path, CHOICE | {"doc_to_choice": choices}))
    assert items[0]["choices"] == ["2", "two"]


def test_a_sentence_that_stands_alone_needs_no_context(tmp_path):
    _, items = read(write(tmp_path, CHOICE | {"doc_to_text": "", "doc_to_target": 0}))
    assert items[0]["text"] == ""


def test_lines_end_at_newlines_only_and_blank_ones_are_left_out(tmp_path):
    odd = "one\u2028two\x85three"
    rows = [json.dumps(ROW | {"question": odd}, ensure_ascii=False), "", json.dumps(ROW), ""]
    _, items = read(write(tmp_path, CHOICE, rows))
    assert [item["text"] for item in items] == [f"Q: {odd}", "Q: two"]


def test_examples_come_from_the_training_split_if_there_is_one(tmp_path):
    raw = CHOICE | {"training_split": "train", "num_fewshot": 1}
    config, _ = read(write(tmp_path, raw))
    assert (config["num_fewshot"], config["fewshot_split"]) == (1, "examples")
    assert [row["text"] for row in config["custom_dataset"]()["examples"]] == ["Q: more"]
    assert read(tmp_path, 0)[0]["num_fewshot"] == 0
    with pytest.raises(DataError, match="has 1 examples to draw from, 2 before each item"):
        read(tmp_path, 2)
    config, _ = read(write(tmp_path, CHOICE), 1)
    assert config["fewshot_split"] == config["test_split"]
    with pytest.raises(DataError, match="has 1 examples to draw from, 2 before each item"):
        read(tmp_path, 2)


@pytest.mark.parametrize(
    ("raw", "row", "message"),
    [
        (CHOICE, {"answers": ["2"]}, "line 2: one choice, where at least two are needed"),
        (CHOICE, {"answers": []}, "line 2: no choices, where at least two are needed"),
        (CHOICE, {"answers": ["2", " "]}, "line 2: choice 2 is empty"),
        (CHOICE, {"answers": "2, 3"}, "line 2: the choices must be a list of texts, not (2, 3)"),
        (CHOICE, {"answers": "two three"}, "line 2: the choices must be a list, not 'two three'"),
        (CHOICE, {"answers": [1, 2]}, "line 2: the choices must be a list of texts, not [1, 2]"),
        (CHOICE, {"label": 2}, "line 2: the right answer 2 is none of the 2 choices"),
        (CHOICE, {"label": -1}, "line 2: the right answer -1 is none of the 2 choices"),
        (CHOICE, {"label": True}, "line 2: the right answer True is none of the 2 choices"),
        (CHOICE, {"label": "B"}, "line 2: the right answer 'B' is none of the 2 choices"),
        (CHOICE | {"doc_to_text": "question"}, {"question": " \n"}, "line 2: the context is empty"),
        (CHOICE | {"doc_to_text": "question"}, {"question": 3}, "line 2: the context must be text, not 3"),
        (OPEN | {"doc_to_target": "word"}, {"word": " "}, "line 2: the text to follow must not be empty"),
        (CHOICE | {"doc_to_text": "{{other}}"}, {}, "line 1: a template of mine.yaml cannot be filled in"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named_by_its_line(tmp_path, raw, row, message):
    assert f"items.jsonl, {message}" in refused(tmp_path, raw, [ROW, ROW | row])


@pytest.mark.parametrize("line", ["{", "[1]", "[" * 100_000, '{"a": "\\ud8"}', "7"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    assert "items.jsonl, line 2, " in refused(tmp_path, CHOICE, [ROW, line])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_type": "generate_until"}, "output_type 'generate_until' is not measured"),
        ({"doc_to_text": None}, "lacks doc_to_text"),
        ({"doc_to_choice": None}, "lacks doc_to_choice"),
        ({"doc_to_txt": "a"}, "key 'doc_to_txt' is not known here; did you mean 'doc_to_text'?"),
        ({"num_fewshot": -1}, "num_fewshot must be a number"),
        ({"num_fewshot": True}, "num_fewshot must be a number"),
        ({"target_delimiter": 3}, "target_delimiter must be text"),
        ({"doc_to_text": "{{"}, "doc_to_text is no template"),
        ({"dataset_path": "someone/set"}, "must have dataset_path json"),
        ({"dataset_kwargs": None}, "must name one file for the split 'test'"),
        ({"dataset_kwargs": {"data_files": {"test": ["a", "b"]}}}, "must name one file for the split 'test'"),
        ({"test_split": None}, "test_split must be text"),
        ({"dataset_kwargs": {"data_files": "../secret.jsonl"}}, "lies outside of its folder"),
        ({"dataset_kwargs": {"data_files": "/etc/passwd"}}, "lies outside of its folder"),
        ({"dataset_kwargs": {"data_files": "none.jsonl"}}, "is no file there"),
        ({"task": 3}, "names no task"),
        ({"process_docs": "x"}, "asks for code or other files by 'process_docs'"),
        ({"class": "x"}, "asks for code"),
        ({"include": "x.yaml"}, "asks for code or other files"),
    ],
)
def test_a_task_file_that_cannot_be_used_says_why(tmp_path, change, message):
    assert message in refused(tmp_path, CHOICE | change)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "secret.jsonl").write_text(json.dumps(ROW))
    folder = tmp_path / "tasks"
    folder.mkdir()
    write(folder, CHOICE)
    (folder / "items.jsonl").unlink()
    (folder / "items.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError, match="outside"):
        tasks.read_folder(folder)


@pytest.mark.parametrize("value", ["!function items.harm", "!!python/object/apply:os.system ['touch ran']"])
def test_yaml_runs_nothing(tmp_path, value, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, CHOICE)
    (tmp_path / "items.py").write_text("open('ran', 'w')\ndef harm(doc): open('ran', 'w')\n")
    (tmp_path / "mine.yaml").write_text(f"task: mine\ndoc_to_text: {value}\n")
    with pytest.raises(DataError, match="asks for code by a tag"):
        tasks.read_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ answers.append('4') }}",
        "{{ range(10000000)|list }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_are_filled_in_by_a_sandbox(tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "items.jsonl, line 1: a template" in refused(tmp_path, CHOICE | {"doc_to_text": template})
    assert not (tmp_path / "ran").exists()


def test_what_does_not_change_a_score_may_stand_in_a_file(tmp_path):
    more = {"tag": "x", "metadata": {"version": 2}, "metric_list": [{"metric": "exact", "hf_evaluate": True}]}
    config, _ = read(write(tmp_path, CHOICE | more))
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc", "acc_norm"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"group": "all", "task": ["mine", "yours"]}, "group 'all' names the task 'yours', which no file is for: "),
        ({"group": "all", "task": ["mime"]}, "did you mean 'mine'?"),
        ({"group": "all", "task": "mine"}, "must be a list of names"),
        ({"group": "mine", "task": ["mine"]}, "second file for 'mine'"),
    ],
)
def test_a_group_names_tasks_that_there_are(tmp_path, group, message):
    write(tmp_path, CHOICE)
    with pytest.raises(DataError) as error:
        tasks.read_folder(write(tmp_path, group, name="z.yaml"))
    assert message in str(error.value)


def test_a_folder_without_tasks_says_so(tmp_path):
    with pytest.raises(DataError, match="no folder of tasks"):
        tasks.read_folder(tmp_path / "none")
    with pytest.raises(DataError, match="holds no task files"):
        tasks.read_folder(tmp_path)
    (tmp_path / "mine.yaml").write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read as YAML"):
        tasks.read_folder(tmp_path)
    with pytest.raises(DataError, match=r"items\.jsonl holds no items"):
        read(write(tmp_path, CHOICE, []))


def test_the_task_file_of_the_documentation_works(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    if not page.exists():
        pytest.skip("the page stands in the source tree")
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    pair = {"sentence_good": "Who left?", "sentence_bad": "Left who?"}
    (named,) = re.findall(r"test: (\w+\.jsonl)", block)
    (tmp_path / named).write_text(json.dumps(pair))
    (task,) = tasks.read_folder(tmp_path).tasks.values()
    (item,) = tasks.config(task)["custom_dataset"]()["test"]
    assert item == {"text": "", "choices": ["Who left?", "Left who?"], "target": 0, "description": ""}
