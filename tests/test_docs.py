"""What the documentation says is what the program does."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from quantforge import recipe, record
from quantforge.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs():
    return load_tool("docs")


@pytest.fixture(scope="module")
def pages(docs):
    """Return what the generator makes now, from the report that is committed."""
    return docs.pages(docs.committed_reports())


@pytest.fixture(scope="module")
def report():
    """Return a report with a float run and runs of gptq, awq+gptq and nf4."""
    found = record.from_json((ROOT / "reports" / "smollm2-135m" / "report.json").read_text(encoding="utf-8"))
    float_run, run = (next(run for run in found.runs if run.method == method) for method in ("fp", "gptq"))
    assert (float_run.method, run.method) == ("fp", "gptq")
    run = replace(run, perplexity=31.3721, kl=0.10893, seconds=85.61)
    joined = replace(run, method="awq+gptq", label="awq+gptq-int3-g64-asym range=mse", perplexity=12.3456)
    return replace(found, runs=(float_run, run, joined, replace(run, method="nf4", label="nf4-f64-dq", kl=0.5)))


def test_the_readme_shows_the_tables_of_the_committed_reports():
    assert load_tool("readme").refreshed(README) == README, "run `make readme`"


def test_the_plots_of_the_readme_are_those_of_the_committed_reports():
    found = load_tool("readme").plots(README)
    assert found
    for file, drawing in found.items():
        assert file.read_text(encoding="utf-8") == drawing, "run `make readme`"
        ElementTree.fromstring(drawing)
        assert "http" not in drawing.replace("http://www.w3.org/", "")


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
        assert found.origins
        for origin in found.origins:
            assert origin.command.startswith("quantforge compare")
            assert origin.versions["torch"]
            assert origin.calibration["text_sha256"]
            assert origin.evaluation["text_sha256"]
        only_ranges = file.parent.name == "ranges"
        assert {run.method for run in found.runs} >= {"fp", "rtn", "lwc" if only_ranges else "gptq"}
        assert json.loads(file.read_text(encoding="utf-8"))["schema"] in record.READABLE


def test_the_pages_are_what_the_generator_makes(docs, pages):
    written = {f.relative_to(docs.DOCS).as_posix(): f.read_text(encoding="utf-8") for f in docs.DOCS.rglob("*.md")}
    assert set(written) - {*docs.HAND} == set(pages), "run `make docs`"
    for path, text in pages.items():
        assert written[path] == text, f"docs/{path} is out of date: run `make docs`"


def test_every_recipe_has_a_page_and_every_page_is_linked(docs, pages):
    assert {f"methods/{name}.md" for name in recipe.names()} < set(pages)
    links = {path: re.findall(r"\]\(([^)#]+)\)", text) for path, text in pages.items()}
    assert {*links["README.md"], "README.md"} == {*pages, *docs.HAND}
    for path, targets in links.items():
        assert targets, path
        for target in targets:
            assert ((docs.DOCS / path).parent / target).exists(), f"{path} links to {target}, which is not there"


@pytest.mark.parametrize("name", recipe.names())
def test_a_page_names_the_paper_the_command_and_every_option_with_its_default(name, pages):
    page = pages[f"methods/{name}.md"]
    (entry,) = (e for e in recipe.catalogue() if e["name"] == name)
    assert entry["paper"] in page
    assert f"quantforge quantize path/to/model --method {name} " in page
    assert ("--calib" in page) == bool(recipe.load(name).needs)
    for option, (_, default) in entry["options"].items():
        (row,) = re.findall(rf"^\| `{re.escape(option)}` \| `{re.escape(str(default))}` \| (.+) \|$", page, re.M)
        assert len(row) > 10, f"{option} is not explained"


def test_a_page_names_the_container_and_the_bits(pages):
    assert "saved as | compressed-tensors: " in pages["methods/gptq.md"]
    assert "`int4-g64-asym`: 4.312 bits per weight" in pages["methods/gptq.md"]
    assert "saved as | native: " in pages["methods/spqr.md"]
    assert (
        "3.625 bits per weight of a 1024 x 1024 layer, and the weights kept in float on top" in pages["methods/spqr.md"]
    )
    extra = (8 * 8 * 2048 + 16 * (1024 + 8)) / 1024**2
    assert f"{4.3125 + extra:.3f} bits per weight" in pages["methods/lorc.md"]


def test_options_that_a_class_inherits_are_described_where_it_does_not_say(docs):
    from quantforge.solvers.gptaq import GPTAQ
    from quantforge.solvers.gptq import GPTQ

    own, inherited = docs.described(GPTAQ), docs.described(GPTQ)
    assert own == {**inherited, "strength": own["strength"]}
    assert set(inherited) == {"damp_percent", "damping", "act_order", "block_size", "range"}
    assert not any(f"{option}  " in docs.prose(GPTQ) for option in inherited)
    assert "min-max" in docs.prose(GPTQ)


def test_a_page_shows_the_runs_of_its_method_alone_and_joined(docs, report):
    gptq, awq, rtn = (docs.method_page(name, {"mine": report}) for name in ("gptq", "awq", "rtn"))
    assert "| gptq-int4-g64-asym | 4.312 | 31.372 | 0.1089 | 85.6 |" in gptq
    assert "| fp | 16.000 | 28.815 | 0.0000 |  |" in gptq
    assert "| awq+gptq-int3-g64-asym range=mse | 4.312 | 12.346 |" in gptq
    assert "| awq+gptq-int3-g64-asym range=mse | 4.312 | 12.346 |" in awq
    assert "| gptq-int4" not in awq
    assert "## Measured" not in rtn
    assert all("## Measured" not in docs.method_page(name, {}) for name in ("gptq", "awq"))


def test_the_worked_example_is_true(docs):
    x, problem = docs.example()
    hessian = problem.hessian
    inverse = torch.linalg.inv(hessian)
    for row in problem.weight[:8]:
        obd, obs = (f(row[None], h)[0] for f, h in ((docs.obd_saliency, hessian), (docs.obs_saliency, inverse)))
        for j in range(8):
            alone = torch.zeros(8, dtype=torch.float64)
            alone[j] = row[j]
            assert float(obd[j]) == pytest.approx(float((x @ alone).square().mean()), rel=1e-9)
            assert float(obs[j]) == pytest.approx(docs.cost_by_least_squares(x, row, j), rel=1e-9)
    solved = docs.OBQ(damp_percent=0.0).solve(problem).base
    r = docs.fit(problem.weight, problem.format)
    steps = docs.obq_order(problem.weight[0], inverse, r, problem)
    error = problem.weight[0] - solved.dequantize(torch.float64)[0]
    assert sorted(j for j, _, _ in steps) == list(range(8))
    assert sum(cost for *_, cost in steps) == pytest.approx(float(error @ hessian @ error) / 2, rel=1e-5)
    assert "most of it falls on the later steps" in docs.lineage_page()
    assert sum(cost for *_, cost in steps[4:]) > sum(cost for *_, cost in steps[:4])
    losses = dict(docs._losses(problem, solved, r))
    nearest, in_order, by_size, obq, best = losses.values()
    assert best < obq < in_order < nearest
    assert obq < by_size
    assert by_size >= in_order  # "gains nothing"


def test_the_table_of_methods_links_pages_and_states_papers(report, tmp_path):
    readme = load_tool("readme")
    slot = "a\n<!-- methods: reports/x/report.json -->\nold\n<!-- end of table -->\nb\n"
    assert readme.refreshed(slot, tmp_path) == slot
    (tmp_path / "reports" / "x").mkdir(parents=True)
    (tmp_path / "reports" / "x" / "report.json").write_text(record.to_json(report), encoding="utf-8")
    filled = readme.refreshed(slot, tmp_path)
    lines = filled.splitlines()
    assert (lines[0], lines[-1]) == ("a", "b")
    assert "old" not in filled
    assert report.origins[0].command in filled
    paper = recipe.load("gptq").paper
    assert f"| [gptq](docs/methods/gptq.md)-int4-g64-asym | {paper} | 4.312 | 31.372 | 0.1089 | 85.6 |" in lines
    assert "| fp |  | 16.000 | 28.815 | 0.0000 |  |" in lines
    (joined,) = (line for line in lines if "range=mse" in line)
    assert joined.startswith("| [awq](docs/methods/awq.md)+[gptq](docs/methods/gptq.md)-int3-g64-asym range=mse | ")
    assert "2306.00978" in joined
    assert paper in joined
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(report.runs)
    assert readme.refreshed(filled, tmp_path) == filled
    for target in re.findall(r"\]\((docs/[^)]+)\)", filled):
        assert (ROOT / target).exists()


def test_what_loads_where_is_shown_with_its_versions(tmp_path):
    readme, interop = load_tool("readme"), load_tool("interop")
    slot = "a\n<!-- loaders: reports/interop/README.md -->\nold\n<!-- end of table -->\nb\n"
    assert readme.refreshed(slot, tmp_path) == slot
    row = interop.Row("w8a8", "compressed-tensors", "stock", 20.5, 20.5, 1, 1, 0, None, 3.0, {"transformers": "5.0"})
    page = interop.page([row, replace(row, loader="vllm", versions={"vllm": "0.32.0"}, error="a | b")])
    (tmp_path / "reports" / "interop").mkdir(parents=True)
    (tmp_path / "reports" / "interop" / "README.md").write_text(page, encoding="utf-8")
    filled = readme.refreshed(slot, tmp_path)
    before, table, rest = filled.split("\n\n")
    versions, after = rest.split("\n<!--")
    assert before == "a\n<!-- loaders: reports/interop/README.md -->"
    lines = table.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("| checkpoint ")
    assert lines[3] in page
    assert versions.splitlines()[0] == "- transformers: transformers 5.0"
    assert versions.splitlines()[1] == "- vLLM (CPU): vllm 0.32.0"
    assert versions.splitlines()[-1].startswith("- ours: quantforge ")
    assert after == " end of table -->\nb\n"
    assert readme.refreshed(filled, tmp_path) == filled
    (tmp_path / "reports" / "interop" / "README.md").write_text("# No table\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README.md has no table"):
        readme.refreshed(slot, tmp_path)


def test_a_table_whose_report_is_gone_is_a_fault(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tool("readme").refreshed("<!-- table: reports/x/report.json -->\n<!-- end of table -->\n", tmp_path)
