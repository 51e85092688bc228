"""Word and byte perplexity: lm-eval's own figures, the law of uniform logits, and no trace of batches."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from quantforge.errors import DataError, ModelError
from quantforge.evaluation import rolling, significance
from quantforge.evaluation.significance import Interval
from quantforge.models import load as loading

TINY = Path(__file__).parents[1] / "data" / "tiny-llama"
TEXTS = (
    "The `for` statement is used to iterate over the elements of a sequence.\n\nIt may have an else clause. " * 3,
    "Café, naïve, 東京: words whose bytes are more than their characters.\n",
    "short",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return loading.read_tokenizer(TINY)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return loading.model(loading.find(str(TINY)))


class Uniform(nn.Module):
    """A model that finds all tokens equally probable."""

    def __init__(self, vocab: int, value: float = 0.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((vocab,), value))
        self.config = SimpleNamespace(max_position_embeddings=64, model_type="llama")

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.detach().expand(*input_ids.shape, -1))


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("vocab", [259, 1000])
def test_uniform_logits_give_the_vocabulary_size_per_token(tokenizer, vocab, window):
    score = rolling.evaluate(Uniform(vocab), tokenizer, TEXTS, window=window, batch_size=3)
    tokens, words, size = (sum(counts) for counts in (score.tokens, score.words, score.bytes))
    assert score.window == (window or 64)
    assert score.token_perplexity == pytest.approx(vocab, rel=1e-5)
    assert score.word_perplexity == pytest.approx(vocab ** (tokens / words), rel=1e-5)
    assert score.byte_perplexity == pytest.approx(vocab ** (tokens / size), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(math.log2(vocab) * tokens / size, rel=1e-5)


def test_every_token_is_counted_and_predicted_once_whatever_the_window(tokenizer, tiny):
    """In one window the first token follows the one that begins a text, and each other one all before it."""
    text = TEXTS[0]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        prompt = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
        logs = tiny(input_ids=prompt).logits[0, :-1].log_softmax(-1)
    whole = float(logs.gather(1, ids[0, :, None]).sum())
    score = rolling.evaluate(tiny, tokenizer, [text])
    assert score.tokens == (ids.shape[1],)
    assert score.window == tiny.config.max_position_embeddings
    assert score.log_likelihoods[0] == pytest.approx(whole, rel=1e-5)
    shorter = rolling.evaluate(tiny, tokenizer, [text], window=32)
    assert shorter.tokens == score.tokens
    assert shorter.log_likelihoods[0] < whole


def test_words_and_bytes_are_counted_as_the_harness_does(tokenizer):
    score = rolling.evaluate(Uniform(259), tokenizer, TEXTS)
    assert score.words == tuple(len(re.split(r"\s+", text)) for text in TEXTS)
    assert score.words[1:] == (12, 1)  # what follows the last white space is an empty word
    assert score.bytes == tuple(len(text.encode("utf-8")) for text in TEXTS)
    assert score.bytes[1] > len(TEXTS[1])


def test_the_figures_are_those_of_a_task_of_the_harness(tokenizer, tiny):
    """A task as lm-eval's own of WikiText is, over the same documents, through the harness's own class and loop."""
    from datasets import Dataset, DatasetDict
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    config = {
        "task": "documents",
        "output_type": "loglikelihood_rolling",
        "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_dict({"page": list(TEXTS)})}),
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "page",
        "metric_list": [{"metric": name} for name in names],
        "num_fewshot": 0,
    }
    harness = HFLM(pretrained=tiny, tokenizer=tokenizer, batch_size=1, max_length=48)
    found = evaluator.evaluate(harness, {"tasks": {"documents": ConfigurableTask(config=config)}}, bootstrap_iters=0)
    score = rolling.evaluate(tiny, tokenizer, TEXTS, window=48, batch_size=4)
    for name in names:
        assert getattr(score, name) == pytest.approx(found["results"]["documents"][f"{name},none"], rel=1e-5)


def test_batches_of_any_size_give_the_same_figures(tokenizer, tiny):
    one, five = (rolling.evaluate(tiny, tokenizer, TEXTS, window=40, batch_size=size) for size in (1, 5))
    assert one.log_likelihoods == pytest.approx(five.log_likelihoods, rel=1e-5)
    assert (one.tokens, one.words, one.bytes) == (five.tokens, five.words, five.bytes)


def test_the_parts_are_the_windows_and_hold_every_token(tokenizer, tiny):
    score = rolling.evaluate(tiny, tokenizer, TEXTS, window=40, batch_size=3)
    assert [size for _, size in score.parts] == [
        min(40, tokens - start) for tokens in score.tokens for start in range(0, tokens, 40)
    ]
    assert sum(value for value, _ in score.parts) == pytest.approx(sum(score.log_likelihoods), rel=1e-6)


def test_every_figure_has_an_interval_that_tells_of_the_loss_per_token(tokenizer, tiny):
    """With windows of one length it is the bootstrap over them; that of words is the same on another scale."""
    score = rolling.evaluate(tiny, tokenizer, [TEXTS[0][:288]], window=24)
    assert score.tokens == (288,)
    found = score.intervals()
    token = significance.perplexity_interval([-value / 24 for value, _ in score.parts])
    assert found["token_perplexity"].low == pytest.approx(token.low, rel=1e-6)
    assert found["token_perplexity"].high == pytest.approx(token.high, rel=1e-6)
    record = score.record()
    for name, one in found.items():
        assert one.low < one.value < one.high
        assert one.value == pytest.approx(getattr(score, name), rel=1e-6)
        assert record["intervals"][name] == [one.low, one.high]
    words, bits = found["word_perplexity"], found["bits_per_byte"]
    assert math.log(words.low) == pytest.approx(math.log(token.low) * 288 / score.words[0], rel=1e-6)
    assert bits.high == pytest.approx(math.log2(found["byte_perplexity"].high), rel=1e-6)


def test_parts_count_by_their_tokens():
    """A short part of great loss moves the mean as little as its tokens do; one loss per token has no spread."""
    even = rolling.RollingScore((-100.0,), (50,), (10,), (200,), 20, ((-40.0, 20), (-40.0, 20), (-20.0, 10)))
    assert even.intervals()["token_perplexity"] == Interval(*[pytest.approx(math.exp(2))] * 3)
    odd = rolling.RollingScore((-104.0,), (50,), (10,), (200,), 20, ((-40.0, 20), (-40.0, 20), (-24.0, 10)))
    assert odd.intervals()["token_perplexity"].value == pytest.approx(math.exp(104 / 50))


def test_one_window_has_no_interval(tokenizer):
    score = rolling.evaluate(Uniform(259), tokenizer, ["one"])
    assert math.isnan(score.intervals()["word_perplexity"].low)
    assert score.record()["intervals"]["word_perplexity"] == [None, None]


def test_nothing_is_left_behind(tokenizer, tiny, capfd):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    rolling.evaluate(tiny, tokenizer, TEXTS, window=40)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert capfd.readouterr() == ("", "")


def test_the_record_is_json_and_says_what_was_counted(tokenizer):
    record = rolling.evaluate(Uniform(259), tokenizer, TEXTS).record()
    assert record["documents"] == 3
    assert record["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    # a loss of 10,000 nats for one word, whose exponential no number holds
    broken = rolling.RollingScore((-1e4,), (10,), (1,), (20,), 64)
    assert (broken.word_perplexity, broken.record()["word_perplexity"]) == (math.inf, None)


def test_what_cannot_be_scored_says_why(tokenizer):
    with pytest.raises(DataError, match="document 2 of 2 is empty"):
        rolling.evaluate(Uniform(259), tokenizer, ["a", " \n"])
    with pytest.raises(DataError, match="no documents"):
        rolling.evaluate(Uniform(259), tokenizer, [])
    with pytest.raises(ModelError, match="no numbers"):
        rolling.evaluate(Uniform(259, math.nan), tokenizer, ["a"])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no token to begin a text with"):
        rolling.evaluate(Uniform(259), bare, ["a"])


@given(st.lists(st.text(st.sampled_from("ab é\n東"), min_size=1), min_size=1, max_size=3), st.integers(1, 40))
def test_a_cut_keeps_whole_words_from_the_start_that_fit(documents, tokens):
    tokenizer = loading.read_tokenizer(TINY)
    kept = rolling.cut(documents, tokenizer, tokens)
    assert all(one == other for one, other in zip(kept[:-1], documents, strict=False))
    sizes = [len(text.encode()) for text in documents]
    if sum(sizes) <= tokens:
        assert kept == tuple(documents)
        return
    assert sum(len(text.encode()) for text in kept) <= tokens + 2  # the bytes of a character count together
    if kept:
        last, source = kept[-1], documents[len(kept) - 1]
        assert source.startswith(last)
        whole = last == source or source[len(last)].isspace() or not any(c.isspace() for c in last.lstrip())
        assert whole, (source, last)


def test_a_cut_is_the_same_for_a_tokenizer_that_does_not_say_where_tokens_end(tokenizer):
    def slow(text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": list(text.encode())}

    slow.is_fast = False  # type: ignore[attr-defined]
    text = "one two three four five"
    assert rolling.cut([text], slow, 13) == rolling.cut([text], tokenizer, 13) == ("one two three",)
    assert rolling.cut([text, text], tokenizer, 30) == (text, "one two")
    assert rolling.cut([text, text], tokenizer, 23) == (text,)
