"""The command line end to end on the trained tiny model: results on stdout, the rest on stderr, exit codes by class."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import click
import pytest
from click.testing import CliRunner, Result

from quantforge import __version__, checkpoint, cli
from quantforge.calibrate import corpus
from quantforge.models import load as loading
from quantforge.result import _write as write

TINY = Path(__file__).parent / "data" / "tiny-llama"
ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *("quantize", "evaluate", "compare", "report", "sensitivity", "calibration-study", "papers"),
    *("distill", "qat", "qlora", "inspect", "methods", "formats"),
    *("convert", "verify", "generate", "bench"),
)
SMALL = ("--samples", "8", "--seq-len", "64")


def run(*args: object) -> Result:
    """Run the command line in this process; an exception that is no clean exit is raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def spawn(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "quantforge", *map(str, args)],
        env=environment, capture_output=True, text=True, timeout=300, check=False, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Return a .txt file of plain English about Python."""
    file = tmp_path_factory.mktemp("text") / "some.txt"
    file.write_text(corpus.load_text("python-docs", "evaluation").text[:6000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def quantized(text, tmp_path_factory) -> tuple[Path, Result]:
    """Return a checkpoint that the command line wrote, and what it printed."""
    out = tmp_path_factory.mktemp("quantized") / "tiny 4 bits"
    return out, run("quantize", TINY, "--bits", 4, "--calib", text, *SMALL, "--out", out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")
    assert run(command, "-h").stdout == result.stdout
    assert command in run("--help").stdout
    for parameter in cli.main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in result.stdout


def test_the_commands_are_these_and_the_version_is_the_packages():
    assert sorted(cli.main.commands) == sorted(COMMANDS)
    assert run("--version").stdout.strip().endswith(__version__)


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, quantforge.cli as cli\n"
        "try: cli.main(['quantize', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_quantize_writes_a_checkpoint_and_says_what_came_of_it(quantized):
    out, result = quantized
    assert result.exit_code == 0
    assert {f.name for f in out.iterdir()} >= {"config.json", "model.safetensors", "quantforge.json", "tokenizer.json"}
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert "gptq, 28 layers at 4.312 bits" in result.stdout
    assert f"next: quantforge evaluate '{out}'" in result.stdout
    assert "transformers 5.23: yes" in result.stdout
    assert "llama.cpp: no, it loads GGUF only; --format gguf" in result.stdout
    assert result.stderr == ""
    assert checkpoint.read_record(out)["calibration"]["count"] == 8


def test_evaluate_scores_float_and_quantized_models(quantized, text):
    found = {}
    for name, folder in (("fp", TINY), ("gptq", quantized[0])):
        result = run("evaluate", folder, "--data", text, "--seq-len", 64, "--windows", 10, "--json")
        assert result.exit_code == 0
        told = "warning: overlap: " if name == "gptq" else ""  # it was calibrated on this very text
        assert result.stderr[: len("warning: overlap: ")] == told
        found[name] = json.loads(result.stdout)
    assert found["fp"]["data"]["ids_sha256"] == found["gptq"]["data"]["ids_sha256"]
    assert found["fp"]["perplexity"] > 1
    assert found["gptq"]["perplexity"] != found["fp"]["perplexity"]
    assert found["gptq"]["perplexity"] == pytest.approx(found["fp"]["perplexity"], rel=0.1)
    assert found["gptq"]["model"] == quantized[0].name
    plain = run("evaluate", TINY, "--data", text, "--seq-len", 64, "--windows", 10).stdout
    low, high = found["fp"]["interval"]
    assert low < found["fp"]["perplexity"] < high
    value = f"token perplexity {found['fp']['perplexity']:.3f} (95 %: {low:.3f} to {high:.3f})"
    assert plain == f"tiny-llama: {value} on 10 x 64 tokens of {text}\n"


def test_evaluate_takes_48_windows_unless_told_and_0_means_all(text):
    counts = {}
    for more in ((), ("--windows", 0)):
        result = run("evaluate", TINY, "--data", text, "--seq-len", 32, "--json", *more)
        counts[more] = json.loads(result.stdout)["data"]["count"]
    assert counts == {(): 48, ("--windows", 0): len(text.read_bytes()) // 32}


def test_compare_prints_the_table_and_writes_the_report(text, tmp_path):
    out = tmp_path / "report"
    arguments = ("compare", TINY, "--methods", "fp,rtn,gptq", "--bits", "3", "--calib", text, "--data", text, *SMALL)
    result = run(*arguments, "--windows", 8, "--out", out)
    assert result.exit_code == 0, result.stderr
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("warning: overlap: ")
    assert sorted(f.name for f in out.iterdir()) == ["report.html", "report.json", "report.md"]
    lines = result.stdout.splitlines()
    assert lines[-1] == str(out / "report.html")
    assert [row.split("|")[1].strip() for row in lines[2:5]] == ["fp", "rtn-int3-g64-asym", "gptq-int3-g64-asym"]
    printed = run(*arguments, "--windows", 8, "--out", tmp_path / "again", "--json")
    record = json.loads(printed.stdout)
    assert [r["perplexity"] for r in record["runs"]] == [
        r["perplexity"] for r in json.loads((out / "report.json").read_text())["runs"]
    ]


def test_inspect_shows_every_layer(quantized):
    result = run("inspect", quantized[0])
    assert result.exit_code == 0
    record = json.loads(run("inspect", quantized[0], "--json").stdout)
    assert len(record["layers"]) == 28
    for row in record["layers"]:
        assert row["name"] in result.stdout
        assert row["format"] == "int4-g64-asym-bf16"
    operators = record.pop("operators")  # of this machine, so no file has them
    assert set(operators) == {row["name"] for row in record["layers"]}
    for found in operators.values():
        assert f"computed by {found['operator']}: 28 layers" in result.stdout
    assert json.loads((quantized[0] / "quantforge.json").read_text()) == record


def test_methods_lists_papers_and_options():
    found = json.loads(run("methods", "--json").stdout)
    assert {"gptq", "rtn"} <= {m["name"] for m in found}
    printed = run("methods").stdout
    for method in found:
        assert method["paper"]
        assert f"{method['name']}: {method['about']}" in printed
        for option, (kind, default) in method["options"].items():
            assert f"  --set {option}={default}  ({kind})\n" in printed


def test_quantize_as_json_holds_the_record_of_the_checkpoint(text, tmp_path):
    out = tmp_path / "out"
    result = run("quantize", TINY, "-m", "rtn", "--bits", 8, "--symmetric", "--out", out, "--json")
    record = json.loads(result.stdout)
    assert record.pop("seconds") > 0  # which are another run's each time, and do not stand in the checkpoint
    assert record.pop("peak_memory") is not None
    assert "vLLM" in {loader["name"] for loader in record.pop("loaders")}
    assert checkpoint.read_record(out) == {**record, "files": ANY, "digests": ANY}
    assert record["format"] == "int8-g64-sym-bf16"
    assert record["calibration"] == {}


def test_settings_reach_the_solver(text, tmp_path):
    out = tmp_path / "out"
    settings = ("--set", "solver.damp_percent=0.05", "--set", "solver.act_order=no", "--group-size", "32")
    run("quantize", TINY, "--calib", text, *SMALL, *settings, "--out", out)
    record = checkpoint.read_record(out)
    assert "damp_percent=0.05" in record["solver"]
    assert "act_order=False" in record["solver"]
    assert {row["damp"] for row in record["layers"]} == {0.05}
    assert record["format"].startswith("int4-g32-asym")


def _formats(*more: object) -> dict[str, str]:
    """Return the format that a dry run plans for each layer."""
    result = run("quantize", TINY, "--dry-run", "--json", *more)
    assert result.exit_code == 0, result.stderr
    return {row["name"]: row["format"] for row in json.loads(result.stdout)["layers"]}


def test_overrides_are_told_by_pattern():
    plain = _formats()
    found = _formats("--override", "*.down_proj:bits=8,symmetric")
    assert found == {name: text for name, text in plain.items() if not name.endswith("down_proj")} | {
        name: text.replace("int4", "int8").replace("asym", "sym")
        for name, text in plain.items()
        if name.endswith("down_proj")
    }
    assert _formats("--override", "*.layers.0.mlp.*:skip") == {n: t for n, t in plain.items() if ".0.mlp." not in n}
    assert _formats("--override", "q_proj:skip=no") == plain
    by_row = _formats("--override", "q_proj:group_size=-1,method=rtn")
    assert {text for name, text in by_row.items() if name.endswith("q_proj")} == {"int4-channel-asym-bf16"}


def test_the_overrides_in_the_help_work():
    (option,) = (p for p in cli.main.commands["quantize"].params if p.name == "overrides")
    examples = re.findall(r"'([^']+)'", option.help)
    assert len(examples) == 2
    for example in examples:
        assert _formats("--override", example) != _formats()


def test_two_overrides_of_one_pattern_count_together_from_the_later_place_on():
    found = _formats("--override", "q_proj:bits=8", "--override", "*.0.*:bits=3", "--override", "q_proj:group_size=16")
    assert {text for name, text in found.items() if name.endswith("q_proj")} == {"int8-g16-asym-bf16"}
    assert {text for name, text in found.items() if name.endswith("k_proj")} == {
        "int3-g64-asym-bf16",
        "int4-g64-asym-bf16",
    }


def test_a_checkpoint_with_overrides_and_joined_methods_is_written_and_read_back(text, tmp_path):
    more = ("--calib", text, *SMALL, "--out", tmp_path / "out", "--json")
    result = run("quantize", TINY, "-m", "awq+gptq", "--override", "down_proj:bits=8", *more)
    assert result.exit_code == 0, result.stderr
    formats = {row["name"]: row["format"] for row in json.loads(result.stdout)["layers"]}
    assert formats == _formats("-m", "awq+gptq", "--override", "down_proj:bits=8")
    scored = run("evaluate", tmp_path / "out", "--data", text, "--seq-len", 64, "--windows", 4, "--json")
    assert scored.exit_code == 0, scored.stderr
    assert json.loads(scored.stdout)["perplexity"] > 1


def test_overwrite_replaces_a_checkpoint_and_nothing_else(text, tmp_path):
    out = tmp_path / "out"
    arguments = ("quantize", TINY, "-m", "rtn", "--out", out)
    assert run(*arguments, "--bits", 4).exit_code == 0
    refused = run(*arguments, "--bits", 8)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--overwrite" in refused.stderr
    assert checkpoint.read_record(out)["format"].startswith("int4")
    assert run(*arguments, "--bits", 8, "--overwrite").exit_code == 0
    assert checkpoint.read_record(out)["format"].startswith("int8")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("out", [None, "out", "new/deep/out"])
def test_a_dry_run_reads_no_weights_and_writes_nothing(out, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    before = _tree(TINY)
    more = ("--out", tmp_path / out) if out else ()
    plain = run("quantize", TINY, "--bits", 3, "--dry-run", *more)
    record = json.loads(run("quantize", TINY, "--bits", 3, "--dry-run", "--json", *more).stdout)
    assert plain.exit_code == 0
    assert len(record["layers"]) == 28
    for row in record["layers"]:
        assert row["name"] in plain.stdout
    assert plain.stdout.splitlines()[-1].startswith("28 layers at 3.297 bits ")
    assert record["bytes_after"] < record["bytes_before"]
    assert list(tmp_path.iterdir()) == []
    assert _tree(TINY) == before


def test_weights_take_any_notation_of_formats(tmp_path, text):
    dry = ("quantize", TINY, "--method", "rtn", "--dry-run", "--json")
    for notation, bits in (("mxfp8", 8.25), ("e4m3-channel", None), ("int8-tensor-sym", None)):
        record = json.loads(run(*dry, "--weights", notation, "--inputs", "e4m3-token").stdout)
        assert bits is None or record["bits_per_weight"] == bits
        assert all(row["format"] == record["layers"][0]["format"] for row in record["layers"])
    result = run("compare", TINY, "--methods", "rtn", "--weights", "e4m3-channel", "--calib", text, *SMALL,
                 "--data", text, "--windows", 2, "--out", tmp_path / "report", "--json")  # fmt: skip
    assert [r["label"] for r in json.loads(result.stdout)["runs"]] == ["fp", "rtn-e4m3-channel"]


def test_dynamic_is_a_setting_of_methods_that_round_inputs():
    dry = ("quantize", TINY, "--dry-run", "--json", "--method")

    def layers(*arguments: str) -> object:
        return json.loads(run(*dry, "llm-int8", *arguments).stdout)["layers"]  # times differ from run to run

    assert layers("--dynamic") == layers("--set", "inputs.dynamic=true") != layers()
    assert run(*dry, "rtn", "--dynamic").exit_code == 2


def test_a_dry_run_works_from_inside_the_model_folder(monkeypatch):
    monkeypatch.chdir(TINY)
    before = _tree(TINY)
    result = run("quantize", ".", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert _tree(TINY) == before


def test_a_dry_run_foretells_the_bits_and_layers_of_the_run(quantized):
    plan = json.loads(run("quantize", TINY, "--bits", 4, "--dry-run", "--json").stdout)
    record = checkpoint.read_record(quantized[0])
    assert [row["name"] for row in plan["layers"]] == [row["name"] for row in record["layers"]]
    assert plan["bits_per_weight"] == record["bits_per_weight"]
    assert plan["bytes_after"] == record["bytes_after"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["quantize", TINY, "--method", "gtpq"], 2, ["'gtpq'", "did you mean 'gptq'?"]),
        (["quantize", TINY, "--bits", "9"], 2, ["2 to 8", "9"]),
        (["quantize", TINY, "--group-size", "0"], 2, ["group size", "-1"]),
        (["quantize", TINY, "--set", "solver.damp_percent=abc"], 2, ["solver.damp_percent", "float", "'abc'"]),
        (["quantize", TINY, "--set", "solver.damp_percent=-1"], 2, ["damp_percent", "between 0 and 1"]),
        (["quantize", TINY, "--set", "solver.damp_percnt=0.1"], 2, ["did you mean 'damp_percent'?"]),
        (["quantize", TINY, "--set", "solvr.damp_percent=0.1"], 2, ["did you mean 'solver.damp_percent'?"]),
        (["quantize", TINY, "--set", "solver.damp_percent"], 2, ["KEY=VALUE"]),
        (["compare", TINY, "--bits", "4,three"], 2, ["--bits", "4,three"]),
        (["compare", TINY, "--methods", "fp,gtpq"], 2, ["did you mean 'gptq'?"]),
        (["compare", TINY, "--methods", ""], 2, ["at least one method"]),
        (["compare", TINY, "--set", "solver.dampness=1"], 2, ["'solver.dampness'"]),
        (["quantize", TINY, "--override", "q_proj"], 2, ["'q_proj'", "PATTERN:KEY=VALUE"]),
        (["quantize", TINY, "--override", "q_proj:"], 2, ["'q_proj:'", "PATTERN:KEY=VALUE"]),
        (["quantize", TINY, "--override", ":bits=8"], 2, ["':bits=8'", "PATTERN:KEY=VALUE"]),
        (["quantize", TINY, "--override", "q_proj:bit=8"], 2, ["'q_proj'", "did you mean 'bits'?"]),
        (["quantize", TINY, "--override", "q_proj:bits"], 2, ["2 to 8"]),
        (["quantize", TINY, "--override", "q_proj:bits=9"], 2, ["2 to 8", "9"]),
        (["quantize", TINY, "--override", "q_proj:bits=²"], 2, ["2 to 8", "'²'"]),
        (["quantize", TINY, "--override", "q_proj:bits=8,,"], 2, ["has no ''"]),
        (["quantize", TINY, "--override", "q_proj:skip=perhaps"], 2, ["skip is yes or no", "'perhaps'"]),
        (["quantize", TINY, "--override", "q_proj:symmetric=8"], 2, ["symmetric is yes or no", "'8'"]),
        (["quantize", TINY, "--override", "q_proj:method=3"], 2, ["no method is called '3'"]),
        (["quantize", TINY, "--override", "q_proj:method=gtpq"], 2, ["did you mean 'gptq'?"]),
        (["quantize", TINY, "--override", "dwon_proj:bits=8"], 2, ["matches no layer", "did you mean 'down_proj'?"]),
        (["compare", TINY, "--override", "dwon_proj:bits=8"], 2, ["matches no layer", "did you mean 'down_proj'?"]),
        (["compare", TINY, "--override", "q_proj:bit=8"], 2, ["did you mean 'bits'?"]),
        (["quantize", TINY, "--method", "gptq+spqr"], 2, ["'gptq+spqr'", "how codes are chosen"]),
        (["quantize", TINY, "--method", "awq+gtpq"], 2, ["'gtpq'", "did you mean 'gptq'?"]),
        (["compare", TINY, "--methods", "rtn,awq+gtpq"], 2, ["'gtpq'", "did you mean 'gptq'?"]),
        (["compare", TINY, "--methods", "gptq+spqr"], 2, ["'gptq+spqr'", "how codes are chosen"]),
        (
            ["quantize", TINY, "-m", "rtn+lorc", "--set", "correction.rank=100000"],
            2,
            ["rank 100000", "at most", "proj"],
        ),
        (["compare", TINY, "--methods", "rtn+lorc", "--set", "correction.rank=100000"], 2, ["rank 100000", "at most"]),
        (["quantize", TINY, "--group-size", "96"], 2, ["model.layers.0.self_attn.q_proj", "64"]),
        (["quantize", "no-such-folder"], 3, ["'no-such-folder'", "local folder"]),
        (["quantize", TINY, "--calib", "python-dosc"], 4, ["did you mean 'python-docs'?"]),
        (["quantize", TINY, "--calib", "nothing.txt"], 4, ["'nothing.txt'"]),
        (["quantize", TINY, "--device", "cuda"], 5, ["--device cpu works"]),
        (["quantize", TINY, "--device", "tpu"], 5, ["'tpu'", "cpu and cuda"]),
    ],
    ids=lambda value: " ".join(map(str, value[2:] or value[:1])) if isinstance(value, list) and value else "",
)
def test_the_exit_code_tells_the_kind_of_fault_and_one_line_says_it(arguments, code, says, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(loading, "reachable", lambda: False)
    monkeypatch.setattr(loading, "snapshot_download", _unreachable)
    monkeypatch.setattr(loading, "model", lambda *a: pytest.fail("weights were read"))
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error[QF-")
    for part in says:
        assert part in line
    assert list(tmp_path.iterdir()) == []


def _unreachable(*args: object, **kwargs: object) -> str:
    raise ConnectionError("no network in tests")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", TINY], "--out DIR is missing"),
        (["quantize", TINY, "--bits", "4.5", "--out", "x"], "'4.5' is not a valid integer"),
        (["quantize", TINY, "--samples", "0", "--out", "x"], "--samples"),
        (["evaluate", TINY, "--seq-len", "1"], "--seq-len"),
        (["compare", TINY], "--out"),
        (["quantise", TINY], "quantise"),
        (["quantize", TINY, "--bitz", "4"], "--bits"),
        (["inspect"], "FOLDER"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and isinstance(value[-1], str) else "",
)
def test_wrong_usage_exits_with_2_and_names_the_option(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert result.stderr.startswith("error[QF-2")
    assert result.stderr.count("\n") == 1
    printed = run(*arguments, "--json")
    assert json.loads(printed.stdout)["error"]["code"].startswith("QF-2")


def test_inspect_of_what_is_no_checkpoint(tmp_path):
    result = run("inspect", TINY)
    assert result.exit_code == 3
    assert "quantforge.json" in result.stderr
    for content in ("", "[]", "{", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "layers": 3}'):
        (tmp_path / "quantforge.json").write_text(content)
        result = CliRunner().invoke(cli.main, ["inspect", str(tmp_path)])
        assert result.exit_code == 3, content
        assert result.stderr.startswith("error[QF-35"), content
        assert len(result.stderr.splitlines()) == 1


def test_json_makes_errors_json_too(monkeypatch):
    arguments = ["quantize", TINY, "--method", "gtpq", "--out", "never", "--json"]
    monkeypatch.setattr(sys, "argv", ["quantforge", *map(str, arguments)])
    result = run(*arguments)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "QF-201"
    assert result.stderr == f"error[QF-201]: {error['message']}\n"


def test_a_real_process_keeps_streams_apart_and_shows_no_bar_or_colour_off_a_terminal(text, tmp_path):
    result = spawn("quantize", TINY, "--calib", text, *SMALL, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "\r" not in result.stdout
    assert result.stdout.startswith("tiny-llama: gptq, 28 layers")


def test_a_closed_stdout_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "quantforge", "methods"],
            cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
    assert result.returncode != 0


def test_an_exception_that_is_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("quantforge.recipe.catalogue", lambda: 1 / 0)
    result = run("methods")
    assert result.exit_code == 70
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--seq-len", 513], ["--calib", "nosuch"]])
def test_a_dry_run_finds_what_the_run_would(arguments, tmp_path):
    asked = ["quantize", TINY, "--out", tmp_path / "out", *arguments]
    dry, real = run(*asked, "--dry-run"), run(*asked)
    assert dry.exit_code == real.exit_code != 0
    assert dry.stderr == real.stderr


def test_a_text_set_that_does_not_exist_is_refused_by_methods_that_need_none(tmp_path):
    result = run("quantize", TINY, "-m", "rtn", "--calib", "python-dosc", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "did you mean 'python-docs'" in result.stderr


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    def told(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        write(*args)

    monkeypatch.setattr("quantforge.result._write", told)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = run("quantize", TINY, "-m", "rtn", "--out", tmp_path / "out")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.exit_code == 0, result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(quantized):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "quantforge", "inspect", quantized[0]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
    assert result.returncode == 5
    assert result.stderr.startswith("error[QF-513]")
    assert result.stderr.count("\n") == 1
