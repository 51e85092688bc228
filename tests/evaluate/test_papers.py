"""The papers' perplexities: every row says its source, its commands are real, and its text is the protocol's."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import datasets
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

import quantforge
from quantforge import api, cli, network, recipe
from quantforge.calibrate import hub
from quantforge.errors import RecipeError
from quantforge.evaluation import papers

ROWS = papers.rows()
SETS = sorted({row.data for row in ROWS.values()})


def run(*args: str) -> Result:
    """Run the command line in this process; an exception that is no clean exit is raised."""
    result = CliRunner().invoke(cli.main, ["papers", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def parsed(command: list[str]) -> dict[str, Any]:
    """Return the options of a command as its own parser reads them."""
    assert command[0] == "quantforge"
    found: click.Command = cli.main.commands[command[1]]
    return found.make_context(command[1], command[2:]).params


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_opt_llama_and_llama_2():
    assert {row.model.split("/")[1].split("-")[0].lower() for row in ROWS.values()} == {"opt", "llama"}
    assert any("Llama-2" in row.model for row in ROWS.values())
    assert SETS == ["c4", "ptb", "wikitext2"]


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_every_row_has_a_source_and_figures_that_make_sense(row):
    assert "arXiv:" in row.paper
    assert row.table
    assert row.seq_len == 2048
    assert row.figures
    for figure in row.figures:
        assert figure.perplexity > 0.99 * row.float_perplexity  # SmoothQuant at 8 bits may come out a little lower
    by_method = [(figure.method, figure.bits) for figure in row.figures]
    assert len(set(by_method)) == len(by_method)


def test_a_float_model_has_one_perplexity_on_one_protocol_but_for_rounding():
    """Except Llama-2 13B, which SmoothQuant's authors measured in bfloat16."""
    found: dict[tuple[str, str], set[float]] = {}
    for row in ROWS.values():
        found.setdefault((row.model, row.data), set()).add(row.float_perplexity)
    for (model, _), values in found.items():
        assert max(values) - min(values) <= (0.08 if "13b" in model and "Llama-2" in model else 0.011), model


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_the_commands_of_a_row_say_what_the_paper_did(row):
    commands = papers.commands(row)
    every = parsed(commands["all of it"])
    assert every["models"] == (row.model,)
    assert every["methods"].split(",") == row.methods
    assert (every["data"], every["windows"], every["seq_len"]) == (row.data, 0, row.seq_len)
    alone = parsed(commands["fp"])
    assert (alone["data"], alone["windows"], alone["seq_len"]) == (row.data, 0, row.seq_len)
    for figure in row.figures:
        made = parsed(commands[f"{figure.method} {figure.bits}"])
        settings = dict(pair.split("=") for pair in made["settings"])
        chosen = recipe.load(
            made["method"], bits=made["bits"], group_size=made["group_size"], symmetric=made["symmetric"],
            settings=settings,
        )  # fmt: skip
        assert (chosen.name, chosen.weights.grid.bits) == (figure.method, figure.bits)
        assert made["out"]


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_run_is_the_comparison_that_the_command_says(row):
    told, arguments = parsed(papers.commands(row)["all of it"]), papers.arguments(row)
    assert told["methods"].split(",") == arguments["methods"]
    assert [int(width) for width in told["bits"].split(",")] == arguments["bits"]
    assert dict(pair.split("=") for pair in told["settings"]) == arguments["settings"]
    assert (told["calib"], told["windows"] or None) == (arguments["calibration"], arguments["windows"])
    for name in ("group_size", "symmetric", "samples", "seq_len", "shuffle", "data"):
        assert told[name] == arguments[name], name


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_list_has_every_row_and_a_row_its_commands():
    listed = run().stdout
    assert all(name in listed for name in ROWS)
    assert len(json.loads(run("--json").stdout)) == len(ROWS)
    said = run("gptq-opt-125m").stdout
    assert "perplexity: fp 27.65, rtn 4 bits 37.28, gptq 4 bits 31.12, rtn 3 bits 1.3e+03" in said
    assert "split test" in said
    assert r"joined by '\n\n'" in said
    for command in papers.commands(ROWS["gptq-opt-125m"]).values():
        assert papers.line(command) in said.splitlines()


def test_an_unknown_row_comes_with_the_nearest():
    result = run("gptq-opt-126m")
    assert result.exit_code == RecipeError.exit_code
    assert "did you mean 'gptq-opt-125m'?" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("args", "message"), [(["--run"], "QF-240"), (["gptq-opt-125m", "--run"], "QF-241.*--out")])
def test_what_a_run_lacks_is_named(args, message, monkeypatch):
    monkeypatch.setattr(network, "reachable", None)
    result = run(*args)
    assert result.exit_code == RecipeError.exit_code
    assert message.split(".*")[0] in result.stderr


def test_without_a_network_a_run_says_so_in_one_line_and_soon(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    result = run("spqr-ptb-llama-7b", "--run", "--out", str(tmp_path / "out"))
    assert time.monotonic() - start < 10
    assert result.exit_code == 5
    assert result.stderr.startswith("error[QF-530]: huggyllama/llama-7b")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_shows_what_was_measured_beside_what_was_published(monkeypatch, tmp_path):
    asked: dict[str, Any] = {}

    class Measured:
        def __init__(self, method: str, bits: int | None, perplexity: float) -> None:
            self.method, self.bits, self.perplexity = method, bits, perplexity

    def compare(model: str, **arguments: Any) -> Any:
        asked.update(arguments, model=model)
        return type("Report", (), {"runs": [Measured("fp", None, 27.6), Measured("gptq", 4, 31.5)]})

    monkeypatch.setattr(network, "reachable", lambda: True)
    monkeypatch.setattr(quantforge, "compare", compare, raising=False)
    result = run("gptq-opt-125m", "--run", "--out", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert asked["model"] == "facebook/opt-125m"
    assert asked["command"].endswith(f"--out {tmp_path}")
    assert asked["resume"] is False
    assert run("gptq-opt-125m", "--run", "--out", str(tmp_path), "--resume").exit_code == 0
    assert asked["resume"] is True
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["fp", "27.65", "27.600"] in lines
    assert ["gptq", "4", "bits", "31.12", "31.500"] in lines
    assert ["rtn", "4", "bits", "37.28", "n/a"] in lines


# --- the text of the protocols, from local stand-ins laid out as the hub's repositories are ---------------------------

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "some", "more", "of", "it"]


def documents(count: int) -> list[str]:
    """Return texts of different length, empty lines and headings among them, as WikiText has them."""
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(i % 23)) for i in range(count)]
    return [f" = {text} = \n" if i % 7 == 0 else text for i, text in enumerate(texts)]


def lay_out(root: Path, name: str, texts: list[str]) -> None:
    """Write a repository under `root` with the files, the columns and the card of the hub's."""
    if name == "c4":
        folder = root / "allenai/c4/en"
        folder.mkdir(parents=True)
        rows = "".join(json.dumps({"text": t, "timestamp": "2019", "url": "u"}) + "\n" for t in texts)
        (folder / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(rows.encode()))
        (folder / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "not this one"}\n'))
    elif name == "ptb":
        for split in ("test", "train"):
            folder = root / "ptb-text-only/ptb_text_only/penn_treebank" / split
            folder.mkdir(parents=True)
            rows = datasets.Dataset.from_dict({"sentence": texts if split == "test" else ["not this one"]})
            rows.to_parquet(folder / "0000.parquet")
    else:
        repository = root / "Salesforce/wikitext"
        card = "---\nconfigs:\n"
        for configuration in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
            card += f"- config_name: {configuration}\n  data_files:\n"
            for split in ("test", "train"):
                file = f"{configuration}/{split}-00000-of-00001.parquet"
                (repository / configuration).mkdir(parents=True, exist_ok=True)
                ours = (configuration, split) == ("wikitext-2-raw-v1", "test")
                datasets.Dataset.from_dict({"text": texts if ours else ["not this one"]}).to_parquet(repository / file)
                card += f"  - split: {split}\n    path: {file}\n"
        (repository / "README.md").write_text(card + "---\n", encoding="utf-8")


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that stands in for the hub: what is asked of the one is loaded from the other."""
    load, root = datasets.load_dataset, tmp_path / "hub"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def local(repository: str, *args: Any, revision: str | None = None, **more: Any) -> Any:
        return load(str(root / repository), *args, cache_dir=str(tmp_path / "cache"), **more)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return root


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte, which puts <s> before a text as OPT's and LLaMA's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=16)


PROTOCOLS: dict[str, tuple[int, int | None, Callable[[list[str]], str]]] = {
    "wikitext2": (400, None, "\n\n".join),
    "ptb": (400, None, " ".join),
    "c4": (1200, 256, lambda texts: " ".join(texts[:1100])),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_gives_the_windows_of_its_protocol(local_hub, name):
    count, most, join = PROTOCOLS[name]
    texts = documents(count) if name != "c4" else [text * 15 for text in documents(count)]
    lay_out(local_hub, name, texts)
    tokenizer = byte_tokenizer()
    ids, told = api.token_ids(
        name, "evaluation", tokenizer=tokenizer, config=LlamaConfig(vocab_size=300), seq_len=2048, count=None
    )
    tokens = tokenizer(join(texts), verbose=False)["input_ids"]
    assert tokens[0] == 256
    assert tokens.count(256) == 1  # one <s>, at the very start
    windows = min(len(tokens) // 2048, most or math.inf)
    assert windows > 3
    assert (most is None) == (len(tokens) // 2048 == windows)
    assert ids.equal(torch.tensor(tokens[: windows * 2048]).view(windows, 2048))
    assert (told["count"], told["seq_len"], told["shuffle"]) == (windows, 2048, False)
