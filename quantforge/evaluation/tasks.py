"""Task files of lm-eval that lie in a folder: read as data, never run, their items checked line by line.

A task file is YAML as lm-eval has it. Here it may not call Python, its items are JSON lines in the same folder, and its
templates are filled in by a sandbox: what lm-eval gets to see are finished contexts, choices and answers.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantforge import resources
from quantforge.errors import DataError, nearest

_TEXTS = ("target_delimiter", "fewshot_delimiter", "description", "test_split", "validation_split", "training_split")
_READ = {
    *("task", "output_type", "dataset_path", "dataset_kwargs", "fewshot_split", "num_fewshot"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", *_TEXTS),
}
# what changes no score here: the metrics are always those of `config`, and the items those of the file
_IGNORED = {
    *("dataset_name", "metadata", "metric_list", "tag", "task_alias"),
    *("should_decontaminate", "doc_to_decontamination_query"),
}
_CODE = ("class", "custom_dataset", "process_docs", "process_results", "use_prompt", "unsafe_code", "include")
_METRICS = {"multiple_choice": ("acc", "acc_norm"), "loglikelihood": ("acc", "perplexity")}
_EVALUATED, _EXAMPLES = "test", "examples"  # the names that the two parts get


class _Missing(StrictUndefined):
    """A field that an item lacks; one inside of a list is noticed too, which shows its items by repr."""

    __repr__ = StrictUndefined.__str__


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses what a short template could make endless or huge: products of texts, and powers."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(part, int | float) for part in (left, right)):
            raise TypeError(f"{operator} is for numbers, and powers are not worked out")
        return super().call_binop(context, operator, left, right)


@dataclass(frozen=True)
class Item:
    """One item, finished.

    text         what stands before the answer
    choices      the answers to choose from; none of an open completion
    target       the place of the right choice, or the text that should follow
    description  what stands before everything
    """

    text: str
    choices: tuple[str, ...]
    target: int | str
    description: str = ""


@dataclass(frozen=True)
class TaskFile:
    """One task: its name, the file, its kind as lm-eval calls it, and what the file says, without the items.

    shots  examples before each item; None: the file does not say
    """

    name: str
    path: Path
    kind: str
    shots: int | None
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Folder:
    """The tasks and groups of one folder by name; a group names tasks."""

    tasks: Mapping[str, TaskFile]
    groups: Mapping[str, tuple[str, ...]]

    def find(self, name: str) -> tuple[TaskFile, ...]:
        """Return the tasks that `name`, a task or a group, stands for; none if it is neither."""
        return tuple(self.tasks[part] for part in self.groups.get(name, (name,)) if part in self.tasks)


def own_folder() -> Path:
    """Return the folder of the tasks that come with quantforge."""
    return resources.data_dir("eval") / "tasks"


def read_folder(folder: Path) -> Folder:
    """Read every .yaml file of `folder`, without the items; DataError for one that is no task, or would run code."""
    if not folder.is_dir():
        raise DataError(460, f"there is no folder of tasks {str(folder)!r}.")
    tasks: dict[str, TaskFile] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.glob("*.yaml")):
        raw = _mapping(path)
        name = raw.get("group", raw.get("task"))
        if not isinstance(name, str) or not name:
            raise DataError(461, f"{path.name} names no task and no group; it needs `task:` and a name.")
        if name in tasks or name in groups:
            raise DataError(461, f"{path.name} is a second file for {name!r}.")
        if "group" in raw:
            groups[name] = _members(path, raw)
        else:
            tasks[name] = _task(path, name, raw)
    if not tasks:
        raise DataError(460, f"the folder {str(folder)!r} holds no task files (*.yaml).")
    for name, parts in groups.items():
        for part in parts:
            if part not in tasks:
                raise DataError(
                    462, f"group {name!r} names the task {part!r}, which no file is for: {_near(part, tasks)}"
                )
    return Folder(tasks, groups)


def config(task: TaskFile, shots: int | None = None) -> dict[str, Any]:
    """Return `task` as lm-eval takes it, its items checked and handed over in memory.

    shots  examples before each item, in place of the file's own
    Raises DataError with its line for an item that cannot be scored, or for more shots than there are examples.
    """
    count = shots if shots is not None else task.shots or 0
    evaluated, examples = _splits(task.raw)
    parts = {_EVALUATED: _items(task, evaluated)}
    if count and examples != evaluated:
        parts[_EXAMPLES] = _items(task, examples)
    pool = len(parts[_EXAMPLES]) if _EXAMPLES in parts else len(parts[_EVALUATED]) - 1
    if count > pool:
        raise DataError(
            468, f"{task.path.name} has {pool} examples to draw from, {count} before each item were asked for."
        )

    def dataset(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({name: Dataset.from_list([vars(i) for i in items]) for name, items in parts.items()})

    return {
        "task": task.name,
        "output_type": task.kind,
        "custom_dataset": dataset,
        "test_split": _EVALUATED,
        # from the items themselves, lm-eval leaves out the one that is asked
        "fewshot_split": _EXAMPLES if _EXAMPLES in parts else _EVALUATED,
        "num_fewshot": count,
        "description": "description",
        "doc_to_text": "text",
        "doc_to_target": "target",
        "metric_list": [{"metric": m, **_aggregation(m)} for m in _METRICS[task.kind]],
        **({"doc_to_choice": "choices"} if task.kind == "multiple_choice" else {}),
        **{key: task.raw[key] for key in ("target_delimiter", "fewshot_delimiter") if key in task.raw},
    }


def _aggregation(metric: str) -> dict[str, Any]:
    return {
        "aggregation": "perplexity" if metric == "perplexity" else "mean",
        "higher_is_better": metric != "perplexity",
    }


def _mapping(path: Path) -> dict[str, Any]:
    try:
        return resources.read_mapping(path)
    except DataError as error:
        if "for the tag" in str(error):
            raise DataError(
                463, f"{path.name} asks for code by a tag such as !function; it is read as data only."
            ) from error
        raise


def _members(path: Path, raw: Mapping[str, Any]) -> tuple[str, ...]:
    members = raw.get("task")
    if not isinstance(members, list) or not members or not all(isinstance(part, str) for part in members):
        raise DataError(462, f"{path.name}: `task` of a group must be a list of names, not {members!r:.80}.")
    return tuple(members)


def _task(path: Path, name: str, raw: dict[str, Any]) -> TaskFile:
    for key in raw:
        if key in _CODE:
            raise DataError(463, f"{path.name} asks for code or other files by {key!r}; it is read as data only.")
        if key not in _READ | _IGNORED:
            raise DataError(464, f"{path.name}: the key {key!r} is not known here; {_near(key, sorted(_READ))}")
    _check_values(path, raw)
    if raw.get("dataset_path") != "json":
        raise DataError(
            465, f"{path.name} must have dataset_path json, with items in its folder, to be read from there."
        )
    task = TaskFile(name, path, raw["output_type"], raw.get("num_fewshot"), raw)
    for split in _splits(raw):
        _file(task, split)
    return task


def _check_values(path: Path, raw: dict[str, Any]) -> None:
    kind, shots = raw.get("output_type"), raw.get("num_fewshot")
    if kind not in _METRICS:
        raise DataError(464, f"{path.name}: output_type {kind!r} is not measured here; {' and '.join(_METRICS)} are.")
    if shots is not None and (type(shots) is not int or shots < 0):
        raise DataError(464, f"{path.name}: num_fewshot must be a number of examples, not {shots!r}.")
    for key in ("doc_to_text", "doc_to_target", *(["doc_to_choice"] if kind == "multiple_choice" else [])):
        if raw.get(key) is None:
            raise DataError(464, f"{path.name} lacks {key}.")
    for key in _TEXTS:
        if key in raw and not isinstance(raw[key], str):
            raise DataError(464, f"{path.name}: {key} must be text, not {raw[key]!r:.80}.")


def _splits(raw: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the names of the split that is evaluated, and of the one that examples come from, as lm-eval has it."""
    evaluated = raw.get("test_split", raw.get("validation_split"))
    return evaluated, raw.get("fewshot_split", raw.get("training_split", raw.get("validation_split", evaluated)))


def _file(task: TaskFile, split: str) -> Path:
    """Return the file of a split; DataError for none, or one outside of the task's folder."""
    kwargs = task.raw.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    name = files.get(split) if isinstance(files, dict) else files
    if not isinstance(split, str) or not isinstance(name, str):
        raise DataError(
            465, f"{task.path.name} must name one file for the split {split!r} in dataset_kwargs: data_files."
        )
    folder = task.path.parent.resolve()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise DataError(466, f"{task.path.name} names {name!r}, which lies outside of its folder.")
    if not file.is_file():
        raise DataError(466, f"{task.path.name} names {name!r}, which is no file there.")
    return file


def item_files(task: TaskFile) -> list[Path]:
    """Return the files that the items of a task and its examples come from."""
    return sorted({_file(task, split) for split in _splits(task.raw)})


def _items(task: TaskFile, split: str) -> tuple[Item, ...]:
    file = _file(task, split)
    finish = _finisher(task)
    found = []
    for where, row in _rows(file):
        try:
            item = finish(row)
        except DataError as error:
            raise DataError(467, f"{where}: {error.args[0]}") from error
        except Exception as error:  # a template can raise anything
            what = f"{type(error).__name__}: {error}"
            raise DataError(
                467, f"{where}: a template of {task.path.name} cannot be filled in: {what.rstrip('.'):.200}."
            ) from error
        found.append(item)
    if not found:
        raise DataError(467, f"{file.name} holds no items.")
    return tuple(found)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the items of a file of JSON lines, each with its place in words."""
    try:
        # only newlines end a line: JSON strings may hold what Python counts as an end, too
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(466, f"{file.name} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        where = f"{file.name}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(467, f"{where}, is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(467, f"{where}, must be an object, not {type(row).__name__}.")
        yield where, row


def _finisher(task: TaskFile) -> Callable[[dict[str, Any]], Item]:
    """Return what makes an `Item` of a row by the templates of `task`."""
    text, target, choices, description = (
        _template(task, key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description")
    )
    asks = bool(task.raw["doc_to_text"])

    def finish(row: dict[str, Any]) -> Item:
        context, answer, options = text(row), target(row), choices(row)
        if not isinstance(context, str):
            raise DataError(467, f"the context must be text, not {context!r:.80}.")
        if asks and not context.strip():
            raise DataError(467, "the context is empty.")
        if task.kind == "loglikelihood":
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(467, f"the text to follow must not be empty, but is {answer!r:.80}.")
            return Item(context, (), answer, str(description(row) or ""))
        listed = _choices(options)
        return Item(context, listed, _place(answer, listed), str(description(row) or ""))

    return finish


def _template(task: TaskFile, key: str) -> Callable[[dict[str, Any]], Any]:
    """Return what finds the value of `key` for a row: the field it names, what its template says, or itself."""
    value = task.raw.get(key)
    if not isinstance(value, str):
        return lambda row: value
    # a sandbox, since lm-eval's own templates can reach anything in Python
    environment = _Sandbox(undefined=_Missing, keep_trailing_newline=True)
    try:
        parsed = environment.parse(value)
        template = environment.from_string(value)
    except TemplateError as error:
        raise DataError(464, f"{task.path.name}: {key} is no template: {error.message}.") from error
    except RecursionError as error:
        raise DataError(464, f"{task.path.name}: {key} is no template: it is nested too deeply.") from error
    if any(list(loop.find_all(nodes.For)) or loop.recursive for loop in parsed.find_all(nodes.For)):
        raise DataError(464, f"{task.path.name}: {key} has a loop in a loop, which may not end; write it out.")
    if list(parsed.find_all((nodes.Macro, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport))):
        raise DataError(464, f"{task.path.name}: {key} defines or loads macros, which may not end; write them out.")
    return lambda row: row[value] if value in row else template.render(row)


def _choices(options: Any) -> tuple[str, ...]:
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(467, f"the choices must be a list, not {options!r:.80}.") from None
    if isinstance(options, dict):
        options = list(options.values())
    if not isinstance(options, list) or not all(isinstance(choice, str) for choice in options):
        raise DataError(467, f"the choices must be a list of texts, not {options!r:.80}.")
    if len(options) < 2:
        raise DataError(467, f"{'one choice' if options else 'no choices'}, where at least two are needed.")
    if not all(choice.strip() for choice in options):
        raise DataError(467, f"choice {[bool(c.strip()) for c in options].index(False) + 1} is empty.")
    return tuple(options)


def _place(answer: Any, choices: tuple[str, ...]) -> int:
    """Return which of `choices` is right: by its place, counted from 0, or by its text."""
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        answer = int(answer) if answer.isascii() and answer.isdecimal() else answer
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(467, f"the right answer {answer!r:.80} is none of the {len(choices)} choices.")
    return answer


def _near(name: str, known: Any) -> str:
    return f"{nearest(name, known)}there are: {', '.join(known)}."
