"""What the documentation says is what the program does."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from quantforge import recipe, record
from quantforge.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_tables_of_the_committed_reports():
    assert load_tool("readme").refreshed(README) == README, "run `make readme`"


@pytest.mark.parametrize("command", sorted(main.commands))
def test_the_readme_names_every_command(command):
    assert f"quantforge {command}" in README


def test_every_option_in_the_readme_exists():
    known = {opt for c in main.commands.values() for p in c.params for opt in (*p.opts, *p.secondary_opts)}
    calls = [part for line in README.splitlines() if line.startswith("quantforge ") for part in line.split()]
    used = {part for part in calls if part.startswith("--")}
    assert used
    assert used <= known


def test_the_tree_in_the_readme_is_the_tree():
    block = re.search(r"^quantforge/\n(.*?)^calib/", README, re.DOTALL | re.MULTILINE)[1]
    named = set(re.findall(r"\b(\w+\.py|\w+/)(?=\s)", block))
    package = ROOT / "quantforge"
    folders = {f"{d.name}/" for d in package.iterdir() if (d / "__init__.py").exists()}
    real = folders | {f.name for f in package.glob("*.py")}
    unnamed = {"__init__.py", "__main__.py"}
    assert real - unnamed <= named, f"the README lacks {sorted(real - unnamed - named)}"
    assert named <= real | {"recipes/", "templates/"}, f"the README names {sorted(named - real)}, which are gone"


def test_every_recipe_states_its_paper():
    for entry in recipe.catalogue():
        assert entry["paper"]
        assert entry["about"]


def test_the_committed_reports_are_readable_and_say_how_they_were_made():
    reports = list((ROOT / "reports").glob("*/report.json"))
    assert reports
    for file in reports:
        found = record.from_json(file.read_text(encoding="utf-8"))
        assert found.command.startswith("quantforge compare")
        assert found.versions["torch"]
        assert found.calibration["text_sha256"]
        assert found.evaluation["text_sha256"]
        assert {run.method for run in found.runs} >= {"fp", "rtn", "gptq"}
        assert json.loads(file.read_text(encoding="utf-8"))["schema"] == record.SCHEMA
