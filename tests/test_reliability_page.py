"""The page on reliability holds the counts that other commands left, and says what nobody measured."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TABLE = [
    {"n": 1, "fault": "a | b", "exit": 3, "does": "refused", "tests": ["test_x.py::test_a[1 ]"]},
    {"n": 2, "fault": "c", "exit": 5, "does": "kept", "differs": "not so", "injected": True, "tests": ["test_y.py"]},
]
FOUND: dict[str, Any] = {
    "torture": {"kills": 1234, "committed": 1000, "runs": 50, "lost": 0, "failed": 0},
    "fuzz": {
        "targets": {
            "header": {
                "inputs": {"mutate": 900, "atheris": 100},
                "came": {"accepted": 10, "QF-306": 988},
                "unexpected": [{"number": 3}, {"number": 4}],
                "slowest": 0.25,
            }
        }
    },
    "faults": {
        "rows": [
            {"n": 1, "passed": 4, "failed": 0, "skipped": 0, "absent": []},
            {"n": 2, "passed": 1, "failed": 1, "skipped": 0, "absent": []},
        ]
    },
    "streaming": {
        "runs": [
            {
                "name": "30 blocks gptq",
                "blocks": 30,
                "bytes": 1e9,
                "peak": 1e9,
                "estimated": 1.1e9,
                "max_memory": "2GB",
            },
            {
                "name": "60 blocks gptq",
                "blocks": 60,
                "bytes": 2e9,
                "peak": 1.02e9,
                "estimated": 1.1e9,
                "max_memory": "2GB",
            },
            {
                "name": "GPTQ",
                "blocks": 32,
                "bytes": 13.5e9,
                "peak": 5.25e9,
                "estimated": 5.5e9,
                "max_memory": "6GB",
            },
        ]
    },
    "overhead": {
        "runs": [{"method": "gptq", "seconds": [10.2, 10.4], "journal": [0.3, 0.3], "commits": 4, "share": 0.03}]
    },
}


def load(name: str) -> ModuleType:
    file = ROOT / "tools" / f"{name}.py"
    if not file.exists():
        pytest.skip("the tool stands in the source tree")
    spec = spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_count_is_on_the_page_and_in_the_summary() -> None:
    tool = load("reliability")
    page, summary = tool.page(FOUND, TABLE), tool.summary(FOUND, TABLE)
    assert "1,234 processes were ended by SIGKILL" in page
    assert "| safetensors header | 900 mutate + 100 atheris | 10 | 988 | 2 | 0.250 |" in page
    assert "| GPTQ | 32 | 13.50 | 6 | 5.50 | 5.25 |" in page
    assert "60 blocks beside that of 30: +2.0 % by GPTQ." in page
    assert "| gptq | 4 | 10.2, 10.4 | 0.3, 0.3 | 3.0 % |" in page
    assert "keeping work costs 3.0 % of GPTQ's time" in summary
    assert "| 1 | a \\| b | 3 | refused | 4 |" in page
    assert "| 2 | c | 5 | kept (not so) — by an injected fault | 1, **not all** |" in page
    assert "1,234 random kills, none of which lost anything" in summary
    assert "1,000 damaged inputs, 2 of which did anything but be read or refused in a line" in summary
    assert "1 of 2 faults" in summary
    assert "13.5 GB of weights quantized in 5.2 GB" in summary
    assert "Not measured" not in page + summary


def test_what_was_not_measured_is_said_to_be_missing() -> None:
    tool = load("reliability")
    absent = dict.fromkeys(tool.COMMANDS)
    page, summary = tool.page(absent, TABLE), tool.summary(absent, TABLE)
    assert page.count("Not measured: there is no reports/raw/") == len(tool.COMMANDS)
    assert page.count("not run") == 2
    assert "Not measured yet: torture, faults, fuzz, streaming, overhead." in summary
    for name in FOUND:
        assert f"reports/raw/{name}.json yet (`make {name}`)" in tool.page({**FOUND, name: None}, TABLE)


def test_losses_are_told() -> None:
    tool = load("reliability")
    bad = {**FOUND, "torture": {**FOUND["torture"], "lost": 2, "failed": 1}}
    assert "something beside them: 2." in tool.page(bad, TABLE)
    assert "3 of which lost anything" in tool.summary(bad, TABLE)


def test_the_readme_gets_its_sentence_between_its_marks_only() -> None:
    tool = load("reliability")
    readme = f"a\n{tool.BEGIN}\nold\n{tool.END}\nb\n"
    assert tool.placed(readme, "new") == f"a\n{tool.BEGIN}\nnew\n{tool.END}\nb\n"
    assert tool.placed("without marks", "new") == "without marks"


def test_a_row_counts_the_tests_that_it_names_and_no_others() -> None:
    tool = load("faults")
    outcomes = {
        "tests/test_x.py::test_a[1 one]": "passed",
        "tests/test_x.py::test_a[fast-1 two]": "failed",
        "tests/test_x.py::test_a[11 three]": "failed",
        "tests/test_x.py::test_ab[1 four]": "failed",
        "tests/other/test_x.py::test_a[1 five]": "failed",
    }
    assert tool.count(TABLE, outcomes) == [
        {"n": 1, "passed": 1, "failed": 1, "skipped": 0, "absent": []},
        {"n": 2, "passed": 0, "failed": 0, "skipped": 0, "absent": ["test_y.py"]},
    ]
