"""Text from checkpoints: the tokens that transformers' own generate gives, and a command that prints them."""

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, DynamicCache

import quantforge
from quantforge import api
from quantforge.cli.generate import generate as command
from quantforge.errors import DataError, PlanError, RecipeError, ResourceError
from quantforge.models import tiny
from quantforge.runtime import generate
from quantforge.runtime.generate import Sampling, new_cache, steps, write

LLAMA = "tests/data/tiny-llama"


def ours(model, ids, count):
    stream = steps(model, ids)
    return torch.stack([next(stream) for _ in range(count)], 1)


def theirs(model, ids, count):
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2", "gemma2", "mistral", "gpt2", "phi3"])
def test_greedy_tokens_are_those_of_transformers(kind):
    # sliding windows of 32 are left behind
    model = tiny.make(kind, seed=3)
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(model, ids, 40), theirs(model, ids, 40))


def test_a_cache_grows_without_forgetting():
    model = tiny.make("llama", max_position_embeddings=1024)
    ids = torch.randint(3, 128, (1, 700), generator=torch.Generator().manual_seed(2))
    caches = new_cache(model), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in ids.split([3, 290, 1, 300, 1, 105], 1):
            one, other = (model(input_ids=part, past_key_values=cache).logits for cache in caches)
            assert torch.allclose(one, other, atol=1e-5)
    for a, b in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_draws_are_settled_by_their_seed_and_kept_to_the_likeliest():
    model = tiny.make("llama")
    ids = torch.randint(3, 128, (1, 8))

    def drawn(**how):
        return list(write(model, ids, 30, sampling=Sampling(**how)))

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    greedy = list(write(model, ids, 30))
    assert drawn(top_p=1e-6, seed=1) == greedy
    assert drawn(temperature=1e-4, seed=1) == greedy


def test_top_p_leaves_the_shares_of_the_rest_as_they_are():
    shares = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).repeat(20_000, 1)
    rng = torch.Generator().manual_seed(0)
    found = generate._draw(shares.log(), Sampling(top_p=0.7), rng).bincount(minlength=4) / len(shares)
    assert found[0] == found[3] == 0
    assert abs(found[1] - 0.625) < 0.02


def test_a_text_ends_with_its_end():
    model = tiny.make("llama")
    ids = torch.randint(3, 128, (1, 8))
    free = list(write(model, ids, 20))
    end = free[5]
    assert list(write(model, ids, 20, ends=frozenset({end}))) == free[: free.index(end) + 1]


def test_what_cannot_be_written_is_refused():
    model = tiny.make("llama")
    with pytest.raises(DataError, match="QF-480"):
        list(write(model, torch.zeros(1, 0, dtype=torch.long), 3))
    with pytest.raises(PlanError, match=r"QF-299.*128 positions.*at most 28"):
        list(write(model, torch.zeros(1, 100, dtype=torch.long), 29))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "model"
    quantforge.quantize(LLAMA, "rtn", bits=4, group_size=32, out=out)
    return out


def test_packed_models_write_what_transformers_writes_with_them(folder):
    model = quantforge.load(folder, torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("the function returns", return_tensors="pt")["input_ids"]
    assert torch.equal(ours(model, ids, 16), theirs(model, ids, 16))
    assert api.generate(folder, "the function returns", max_new_tokens=16, dtype=torch.float32).tokens == tuple(
        ours(model, ids, 16)[0].tolist()
    )


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False)


def test_the_command_prints_text_alone_or_json(folder):
    plain = run(folder, "--prompt", "the function", "--max-new-tokens", 5)
    told = json.loads(run(folder, "--prompt", "the function", "--max-new-tokens", 5, "--json").stdout)
    assert plain.exception is None
    assert plain.stdout == told["text"] + "\n"
    assert len(told["tokens"]) <= 5
    assert sum(told["operators"].values()) > 0
    assert 0 < told["first_token_seconds"] <= told["seconds"]


def test_the_reference_is_the_dequantized_model(folder):
    how = ("--max-new-tokens", 8, "--reference", "--json", "--dtype", "float32")
    told = json.loads(run(folder, "--prompt", "the", *how).stdout)
    assert told["operators"] == {}
    level = quantforge.load(folder, torch.float32, packed=False)
    ids = AutoTokenizer.from_pretrained(folder)("the", return_tensors="pt")["input_ids"]
    assert told["tokens"] == list(write(level, ids, 8, ends=generate.ends_of(level)))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--reference", "--strict"], RecipeError, "QF-229"),
        (["--dtype", "float8"], RecipeError, "no dtype is called 'float8'"),
        (["--device", "tpu"], ResourceError, "QF-501"),
        (["--max-new-tokens", 100_000], PlanError, "positions"),
    ],
)
def test_the_command_refuses_in_a_line(folder, arguments, error, said):
    found = run(folder, "--prompt", "the", *arguments)
    assert isinstance(found.exception, error)
    assert said in str(found.exception)
    assert "\n" not in str(found.exception)
