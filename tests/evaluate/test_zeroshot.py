"""The harness's own loop over a loaded model: right answers, no trace left behind, errors before any work."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from quantforge import network
from quantforge.errors import DataError, ModelError, ResourceError
from quantforge.evaluation import zeroshot
from quantforge.evaluation.significance import mcnemar
from quantforge.models import load as loading

TINY = Path(__file__).parents[1] / "data" / "tiny-llama"
SMOKE = zeroshot.SUITES["smoke"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the tokenizer of one token per byte, with tokens that begin and end a text."""
    return loading.read_tokenizer(TINY)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return loading.model(loading.find(str(TINY)))


class Alphabet(nn.Module):
    """A model that finds a token the more probable the nearer its id is to that of the token before."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        ids = torch.arange(vocab, dtype=torch.float32)
        self.table = nn.Parameter(-(ids[:, None] - ids).abs())
        self.config = SimpleNamespace(max_position_embeddings=512, model_type="llama")

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def folder(where: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a task `mine` of two sentences each."""
    raw = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": "rows.jsonl"},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
    } | changes
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (where / "mine.yaml").write_text(yaml.safe_dump(raw))
    return where


ROWS = [{"text": "a", "choices": ["b", "z", "p"], "label": i % 3} for i in range(9)]


def test_answers_are_right_where_the_model_finds_the_right_choice_most_probable(tmp_path, tokenizer):
    model = Alphabet(len(tokenizer))
    (score,) = zeroshot.evaluate(model, tokenizer, ["mine"], folders=[folder(tmp_path, ROWS)])
    assert score.answers == (True, False, False) * 3
    assert score.summary.share.value == pytest.approx(1 / 3)
    assert score.summary.chance == pytest.approx(1 / 3)
    assert score.summary.items == 9
    assert set(score.others) == {"acc_norm"}
    record = json.loads(json.dumps(score.record(), allow_nan=False))
    assert record["answers"] == "100100100"
    assert record["accuracy"] == score.summary.share.value


def test_chance_is_that_of_each_items_choices_and_open_completions_have_none(tmp_path, tokenizer):
    model = Alphabet(len(tokenizer))
    rows = [ROWS[0], ROWS[0] | {"choices": ["z", "b"]}]
    (score,) = zeroshot.evaluate(model, tokenizer, ["mine"], folders=[folder(tmp_path, rows)])
    assert score.answers == (True, False)
    assert score.summary.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    rows = [{"text": "ab", "label": "a"}, {"text": "ab", "label": "b"}, {"text": "ab", "label": "bb"}]
    where = folder(tmp_path, rows, output_type="loglikelihood")
    (score,) = zeroshot.evaluate(model, tokenizer, ["mine"], folders=[where])
    assert score.answers == (False, True, True)
    assert math.isnan(score.summary.chance)
    assert score.record()["chance"] is None
    assert score.record()["p"] is None


def test_log_likelihoods_are_those_of_the_model(tmp_path, tokenizer, tiny):
    """The perplexity of open completions, by hand: exp of the mean loss of the words, each after its own text."""
    rows = [{"text": "def add", "label": "(self)"}, {"text": "a longer text, and then", "label": " x"}]
    where = folder(tmp_path, rows, output_type="loglikelihood")
    (score,) = zeroshot.evaluate(tiny, tokenizer, ["mine"], folders=[where])
    total = 0.0
    for row in rows:
        ids = tokenizer(row["text"] + row["label"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = tiny(input_ids=ids).logits[0].log_softmax(-1)
        start = ids.shape[1] - len(row["label"])
        total += sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
    assert score.others["perplexity"] == pytest.approx(math.exp(-total / 2), rel=1e-4)


def test_batches_of_any_size_give_the_same_scores(tokenizer, tiny):
    found = [
        zeroshot.evaluate(tiny, tokenizer, ["quantforge_completions"], limit=12, batch_size=size)[0] for size in (1, 5)
    ]
    assert found[0].answers == found[1].answers
    assert found[0].items == found[1].items
    assert found[0].others["perplexity"] == pytest.approx(found[1].others["perplexity"], rel=1e-4)


def test_the_limit_takes_items_from_the_start(tokenizer, tiny):
    few, more = (zeroshot.evaluate(tiny, tokenizer, ["quantforge_smoke"], limit=n) for n in (6, 9))
    assert [score.task for score in few] == list(SMOKE)
    assert [score.summary.items for score in few] == [6, 6, 6]
    for one, other in zip(few, more, strict=True):
        assert one.answers == other.answers[:6]
        assert one.items != other.items
        assert mcnemar(one.answers, other.answers[:6]).p == 1


def test_the_digest_tells_items_and_prompts_apart(tmp_path, tokenizer, tiny):
    def digest(rows: list[dict[str, Any]], **more: Any) -> str:
        return zeroshot.evaluate(tiny, tokenizer, ["mine"], folders=[folder(tmp_path, rows)], **more)[0].items

    first = digest(ROWS)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert digest(ROWS) == first
    different = [digest(ROWS[::-1]), digest(ROWS[:-1]), digest(ROWS, shots=2), digest(ROWS, shots=2, seed=1)]
    different += [digest([*ROWS[:-1], ROWS[-1] | {"label": 0}]), digest([*ROWS[:-1], ROWS[-1] | {"text": "c"}])]
    assert len({first, *different}) == 7


def test_examples_are_drawn_by_the_seed_and_never_the_item_itself(tmp_path, tokenizer, monkeypatch):
    rows = [{"text": f"{i}?", "choices": ["yes", "no"], "label": 0} for i in range(8)]
    seen: list[list[str]] = []
    score = zeroshot._score

    def watch(name: str, found: Any) -> Any:
        seen.append([sample["arguments"][0][0] for sample in found["samples"][name]])
        return score(name, found)

    monkeypatch.setattr(zeroshot, "_score", watch)
    model = Alphabet(len(tokenizer))
    for seed in (0, 0, 1):
        (found,) = zeroshot.evaluate(model, tokenizer, ["mine"], folders=[folder(tmp_path, rows)], shots=3, seed=seed)
        assert found.shots == 3
    assert seen[0] == seen[1] != seen[2]
    for i, prompt in enumerate(seen[0]):
        *examples, asked = prompt.split("\n\n")
        assert asked == f"{i}?"
        assert len(set(examples)) == 3
        assert f"{i}?yes" not in examples


def test_the_number_of_examples_is_the_tasks_own_unless_asked(tmp_path, tokenizer):
    model = Alphabet(len(tokenizer))
    where = [folder(tmp_path, ROWS, num_fewshot=2)]
    assert zeroshot.evaluate(model, tokenizer, ["mine"], folders=where)[0].shots == 2
    assert zeroshot.evaluate(model, tokenizer, ["mine"], folders=where, shots=0)[0].shots == 0
    with pytest.raises(DataError, match="has 8 examples to draw from, 9 before each"):
        zeroshot.check(["mine"], where, shots=9)


@pytest.mark.parametrize("shots", [None, 2])
def test_random_states_modes_logs_and_the_tokenizer_are_left_as_they_were(tmp_path, tiny, capfd, shots):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY, pad_token=None)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    level, pad, stderr = logging.root.manager.disable, tokenizer.pad_token, sys.stderr
    tiny.train()
    try:
        zeroshot.evaluate(tiny, tokenizer, ["mine"], folders=[folder(tmp_path, ROWS)], shots=shots)
        assert tiny.training
    finally:
        tiny.eval()
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (logging.root.manager.disable, tokenizer.pad_token, sys.stderr) == (level, pad, stderr)
    assert capfd.readouterr() == ("", "")


def test_nothing_seeds_the_global_generators(tmp_path, tokenizer, monkeypatch):
    """They are put back at the end; but what seeds them on the way would decide what a model with dropout does."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a global generator was seeded")

    for module, name in ((random, "seed"), (np.random, "seed"), (torch, "manual_seed"), (torch.random, "manual_seed")):
        monkeypatch.setattr(module, name, refuse)
    model = Alphabet(len(tokenizer))
    zeroshot.evaluate(model, tokenizer, ["mine"], folders=[folder(tmp_path, ROWS)], shots=2, seed=7)


def test_weights_that_the_config_would_tie_stay_apart(tmp_path, tokenizer, tiny):
    head = tiny.get_output_embeddings()
    kept = head.weight
    try:
        head.weight = nn.Parameter(kept.detach() * -1)
        zeroshot.evaluate(tiny, tokenizer, ["mine"], folders=[folder(tmp_path, ROWS)])
        assert not torch.equal(head.weight, tiny.get_input_embeddings().weight)
    finally:
        head.weight = kept


def test_a_broken_model_has_no_scores(tmp_path, tokenizer):
    """The first of choices that are all NaN would be the best one."""
    model = Alphabet(len(tokenizer))
    model.table.data.fill_(math.nan)
    with pytest.raises(ModelError, match="no numbers"):
        zeroshot.evaluate(model, tokenizer, ["mine"], folders=[folder(tmp_path, ROWS)])


def test_a_tokenizer_without_special_tokens_scores_items_with_a_context(tmp_path, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert bare.bos_token_id is bare.eos_token_id is bare.pad_token_id is None
    model = Alphabet(len(tokenizer))
    (score,) = zeroshot.evaluate(model, bare, ["mine"], folders=[folder(tmp_path, ROWS)])
    assert score.answers == (True, False, False) * 3
    where = folder(tmp_path, ROWS, doc_to_text="")
    with pytest.raises(DataError, match="no token to begin a text with"):
        zeroshot.evaluate(model, bare, ["mine"], folders=[where])


def test_texts_longer_than_the_models_positions_lose_their_beginning(tmp_path, tokenizer, tiny):
    rows = [{"text": "x" * 700, "choices": ["a", "b"], "label": 0}]
    (score,) = zeroshot.evaluate(tiny, tokenizer, ["mine"], folders=[folder(tmp_path, rows)])
    assert score.summary.items == 1


# what is wrong is said before a model is loaded


@pytest.mark.parametrize(
    ("name", "near"),
    [("quantforge_pair", "quantforge_pairs"), ("helaswag", "hellaswag"), ("quantforge_smok", "quantforge_smoke")],
)
def test_an_unknown_task_names_the_nearest_one(name, near, monkeypatch):
    monkeypatch.setattr(network, "reachable", lambda: pytest.fail("the network was asked"))
    with pytest.raises(DataError, match=f"no task is called '{name}': did you mean '{near}'"):
        zeroshot.check([name])


def test_every_task_of_the_standard_suite_is_one_of_the_harness(monkeypatch):
    monkeypatch.setattr(zeroshot, "_offline", lambda: True)
    local, hub = zeroshot.resolve(zeroshot.SUITES["standard"])
    assert (local, tuple(hub)) == ([], zeroshot.SUITES["standard"])
    names = zeroshot._harness_names()
    assert all(names[name].is_file() for name in hub)
    assert names["mmlu"] is None  # a group


def test_without_network_a_hub_task_says_so_soon(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "reachable", lambda: False)
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"'piqa' come from the hub, which cannot be reached.*--suite smoke"):
        zeroshot.check(["quantforge_pairs", "piqa"])
    assert time.monotonic() - start < 10
    zeroshot.check(["quantforge_pairs"])


def test_offline_mode_reads_items_that_were_loaded_before_or_says_so(monkeypatch, tmp_path, tokenizer):
    for owner in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(owner, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(network, "reachable", lambda: pytest.fail("the network was asked"))
    zeroshot.check(["piqa"])
    with pytest.raises(DataError, match="the task 'piqa' cannot be loaded: ") as error:
        zeroshot.evaluate(Alphabet(len(tokenizer)), tokenizer, ["piqa"])
    assert "\n" not in str(error.value)


def test_a_task_of_the_harness_is_scored_on_items_that_the_hub_would_give(monkeypatch, tokenizer):
    rows = {"question": ["a", "a"], "choices": [{"text": ["b", "z"], "label": ["A", "B"]}] * 2, "answerKey": ["A", "B"]}
    parts = datasets.DatasetDict({part: datasets.Dataset.from_dict(rows) for part in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: parts)
    monkeypatch.setattr(zeroshot, "_check_hub", lambda names: None)
    for shots in (None, 1):
        (score,) = zeroshot.evaluate(Alphabet(len(tokenizer)), tokenizer, ["arc_easy"], shots=shots)
        assert (score.task, score.shots, len(score.answers)) == ("arc_easy", shots or 0, 2)
        assert score.summary.chance == 0.5
    with pytest.raises(DataError, match="'arc_easy' has 2 examples to draw from, 7 before each"):
        zeroshot.evaluate(Alphabet(len(tokenizer)), tokenizer, ["arc_easy"], shots=7)


def test_a_task_of_another_kind_is_refused(monkeypatch, tokenizer):
    rows = datasets.Dataset.from_dict({"question": ["a"], "answer": ["#### 1"]})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict({"train": rows, "test": rows})
    )
    monkeypatch.setattr(zeroshot, "_check_hub", lambda names: None)
    with pytest.raises(DataError, match="'gsm8k' is of the kind 'generate_until'"):
        zeroshot.evaluate(Alphabet(len(tokenizer)), tokenizer, ["gsm8k"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shots": -1}, "shots must be at least 0"),
        ({"limit": 0}, "limit must be at"),
        ({"batch_size": 0}, "batch size"),
    ],
)
def test_counts_must_be_counts(more, message):
    with pytest.raises(DataError, match=message):
        zeroshot.check(SMOKE, **more)
    with pytest.raises(DataError, match="no task is named"):
        zeroshot.check([])


def test_a_folder_of_ones_own_goes_before_ours(tmp_path, tokenizer):
    where = folder(tmp_path, ROWS, task="quantforge_pairs")
    (score,) = zeroshot.evaluate(Alphabet(len(tokenizer)), tokenizer, ["quantforge_pairs"], folders=[where])
    assert score.summary.items == len(ROWS)
    assert zeroshot.everything([where]) == ("quantforge_pairs",)
