"""Make a folder of task files of minimal pairs in the format of BLiMP: `python tools/blimp_tasks.py DATA OUT [ITEMS]`.

DATA holds a .jsonl file for each paradigm, each line with the fields sentence_good and sentence_bad. OUT gets a copy of
each, or of its first ITEMS, a task file for it, and `blimp`, the group of all: `quantforge evaluate --task-dir OUT`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml


def task(name: str, file: str) -> dict[str, object]:
    """Return a task of lm-eval: of two whole sentences, the good one should be the more likely one."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def write(data: Path, out: Path, items: int | None = None) -> list[str]:
    """Write the task files for the .jsonl files of `data`, and return the tasks' names."""
    if data.resolve() == out.resolve():
        raise SystemExit(f"{out} holds the data itself; name another folder")
    files = sorted(data.glob("*.jsonl"))
    if not files:
        raise SystemExit(f"{data} holds no .jsonl files")
    out.mkdir(parents=True, exist_ok=True)
    names = [f"blimp_{file.stem}" for file in files]
    for name, file in zip(names, files, strict=True):
        lines = file.read_text(encoding="utf-8").strip("\n").split("\n")[:items]
        (out / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (out / f"{name}.yaml").write_text(yaml.safe_dump(task(name, file.name), sort_keys=False), encoding="utf-8")
    group = yaml.safe_dump({"group": "blimp", "task": names}, sort_keys=False)
    (out / "blimp.yaml").write_text(group, encoding="utf-8")
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("items", type=int, nargs="?", help="of each paradigm; default: all")
    given = parser.parse_args()
    print(f"{len(write(given.data, given.out, given.items))} tasks in {given.out}")
