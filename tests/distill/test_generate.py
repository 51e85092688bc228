"""What a model writes itself: the same as without a cache, settled by the seed, and of ordinary tokens."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from quantforge import kept
from quantforge.distill.generate import Tokens, continued, next_logits, self_text, tokens_of, writing
from quantforge.distill.gkd import left_pad, positions_of
from quantforge.errors import DataError, RecipeError
from quantforge.models import load as loading
from quantforge.models import tiny

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
PROMPTS = [[5, 9, 23], [7], [11, 4, 60, 33, 2, 8, 90, 17]]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny.make("llama")


def whole_logits(model: nn.Module, text: list[int]) -> Tensor:
    return model(torch.tensor([text]), use_cache=False).logits[0, -1]


# --- through the cache ------------------------------------------------------------------------------------------------


def test_only_the_last_tokens_logits_are_worked_out_with_adapters_or_without():
    for adapted in (False, True):
        model, seen = tiny.make("llama"), []
        model.lm_head.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.shape[1]))
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])) if adapted else model
        ids = torch.tensor([[5, 9, 23]])
        next_logits(model)(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(3)[None], None)
        assert seen == [1]


@pytest.mark.parametrize("arch", [*tiny.names(), *tiny.mixtures()])
@torch.no_grad()
def test_the_next_logits_are_those_of_a_forward_over_all_of_the_text(arch):
    """Prompts of several lengths, padded on the left; far enough that sliding windows slide."""
    model = tiny.make(arch)
    following, state = next_logits(model), None
    ids, attention = left_pad(PROMPTS, 99)
    texts = [list(prompt) for prompt in PROMPTS]
    fresh = ids
    for step in range(40):
        logits, state = following(fresh, attention, positions_of(attention)[:, -fresh.shape[1] :], state)
        if step % 13 == 0:
            for text, found in zip(texts, logits, strict=True):
                torch.testing.assert_close(found, whole_logits(model, text), rtol=1e-4, atol=1e-4)
        fresh = torch.tensor([[(7 * step + 3 * row) % 128] for row in range(len(texts))])
        texts = [[*text, int(token)] for text, token in zip(texts, fresh, strict=True)]
        attention = torch.cat([attention, torch.ones(len(texts), 1, dtype=torch.bool)], 1)


def test_a_prompts_logits_are_not_worked_out_but_for_the_last(llama):
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    ids, attention = left_pad(PROMPTS, 0)
    next_logits(llama)(ids, attention, positions_of(attention), None)
    handle.remove()
    assert seen == [1]


def test_banned_tokens_have_no_probability(llama):
    banned = torch.zeros(128, dtype=torch.bool)
    banned[[3, 50]] = True
    ids, attention = left_pad(PROMPTS, 0)
    logits, _ = next_logits(llama, banned)(ids, attention, positions_of(attention), None)
    assert (logits[:, banned] == -torch.inf).all()
    assert logits[:, ~banned].isfinite().all()


def test_writing_is_without_gradient_in_evaluation_mode_and_leaves_all_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()
    with writing(model):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False]


# --- a model's own text -----------------------------------------------------------------------------------------------


def test_a_text_is_settled_by_its_first_token_for_as_long_as_it_is_greedy(llama):
    tokens = tokens_of(None, llama.config)
    banned = tokens.banned(torch.device("cpu"))
    found = self_text(llama, tokens, 9, 12, seed=0)
    for i, row in enumerate(found.tolist()):
        text = row[:1]
        for _ in range(1, (3, 4, 5)[i % 3]):
            text.append(int(whole_logits(llama, text).masked_fill(banned, -torch.inf).argmax()))
        assert row[: len(text)] == text, i
    others = self_text(llama, tokens, 9, 12, seed=1)
    prefixes = {row[0]: row[1:3] for row in found.tolist()}
    same = [row for row in others.tolist() if row[0] in prefixes]
    assert all(prefixes[row[0]] == row[1:3] for row in same)


def test_the_same_seed_writes_the_same_texts_and_another_one_others(llama):
    tokens = tokens_of(None, llama.config)
    first = self_text(llama, tokens, 6, 20, seed=3)
    assert first.shape == (6, 20)
    assert first.dtype == torch.int64
    assert torch.equal(first, self_text(llama, tokens, 6, 20, seed=3))
    assert not torch.equal(first, self_text(llama, tokens, 6, 20, seed=4))
    assert torch.equal(first[:, 0], self_text(llama, tokens, 6, 20, seed=3, batch=2)[:, 0])


def test_what_is_not_greedy_is_drawn(llama):
    """One start for all texts: the greedy tokens agree, and what follows them does not."""
    one = Tokens((9,), tuple(i for i in range(3, 128) if i != 9), (), 128)
    found = self_text(llama, one, 8, 16, greedy=(4,)).tolist()
    assert len({tuple(row[:4]) for row in found}) == 1
    assert len({tuple(row[4:]) for row in found}) == 8


def test_texts_begin_with_different_ordinary_tokens_until_all_have_been_first(llama):
    tokens = tokens_of(None, llama.config)
    assert set(tokens.starts) == set(range(3, 128))
    assert tokens.ends == (2,)
    found = self_text(llama, tokens, 130, 1)
    assert sorted(found[:125, 0].tolist()) == list(range(3, 128))
    assert found.unique().numel() == 125


def test_nothing_but_ordinary_tokens_and_the_end_is_written(llama):
    found = self_text(llama, tokens_of(None, llama.config), 32, 60)
    assert set(found.unique().tolist()) <= set(range(2, 128))


def test_the_end_of_a_text_is_written_and_the_model_goes_on():
    class Ending(nn.Module):
        """Finds the end most probable after a 5, and a 5 after it."""

        config = tiny.make("llama").config

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
            logits = torch.zeros(*input_ids.shape, 128) + 100 * nn.functional.one_hot(7 - input_ids % 64, 128)
            return type("Output", (), {"logits": logits})

    found = self_text(Ending(), Tokens((5,), (2,), (), 128), 2, 7)
    assert found.tolist() == [[5, 2, 5, 2, 5, 2, 5]] * 2


def test_a_tokenizers_special_tokens_neither_begin_a_text_nor_count_among_it():
    source = loading.find(str(TINY))
    tokenizer = loading.tokenizer(source)
    tokens = tokens_of(tokenizer, source.config)
    special = set(tokenizer.all_special_ids)
    assert special
    assert not special & set(tokens.starts)
    assert set(tokens.starts) | special == set(tokenizer.get_vocab().values())


def test_what_a_tokenizer_puts_before_a_text_is_seen_by_the_model_and_not_returned(llama):
    plain = tokens_of(None, llama.config)
    led = Tokens(plain.starts, plain.ends, (1,), plain.vocab)
    found = self_text(llama, led, 3, 10, seed=5)
    assert found.shape == (3, 10)
    banned = plain.banned(torch.device("cpu"))
    for row in found.tolist():
        assert row[1] == int(whole_logits(llama, [1, row[0]]).masked_fill(banned, -torch.inf).argmax())
        assert row[0] != 1


def test_ids_that_no_token_has_are_never_written():
    class Tokenizer:
        all_special_ids = (2,)
        added_tokens_decoder = MappingProxyType({})
        eos_token_id = 2

        def get_vocab(self):
            return {str(i): i for i in range(40)}

        def __call__(self, text, verbose):
            return {"input_ids": [2, 7]}

    model = tiny.make("llama")
    tokens = tokens_of(Tokenizer(), model.config)
    assert tokens.lead == (2,)
    assert int(self_text(model, tokens, 16, 40).max()) < 40


def test_a_prompt_is_continued_with_as_many_tokens_as_asked(llama):
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10], [3, 4, 5]])
    found = continued(llama, prompts, 6, seed=1, batch=2)
    assert found.shape == (3, 9)
    assert torch.equal(found[:, :3], prompts)
    assert torch.equal(found, continued(llama, prompts, 6, seed=1, batch=2))
    assert not torch.equal(found, continued(llama, prompts, 6, seed=2, batch=2))
    greedy = continued(llama, prompts, 4, temperature=0)
    for row in greedy.tolist():
        assert row[5] == int(whole_logits(llama, row[:5]).argmax())


@pytest.mark.parametrize("sizes", [{"samples": 0}, {"seq_len": 0}, {"batch": 0}, {"greedy": (3, 0)}])
def test_sizes_below_one_are_refused(llama, sizes):
    wanted = {"samples": 1, "seq_len": 8, **sizes}
    with pytest.raises(RecipeError, match="cannot be written"):
        self_text(llama, tokens_of(None, llama.config), **wanted)


def test_a_model_that_has_broken_down_writes_nothing():
    model = tiny.make("llama")
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(DataError, match="the model has broken down"):
        self_text(model, tokens_of(None, model.config), 2, 8)


def test_a_vocabulary_of_special_tokens_alone_is_refused():
    config = tiny.make("llama", vocab_size=3).config
    with pytest.raises(DataError, match="no ordinary token"):
        tokens_of(None, config)


# --- what is kept -----------------------------------------------------------------------------------------------------

FACTS = {"model": "a" * 64, "tokenizer": "b" * 64}


def test_what_is_kept_is_read_again_bit_by_bit(tmp_path):
    tensors = {"ids": torch.arange(6).view(2, 3), "small": torch.arange(3).to(torch.uint16), "p": torch.rand(4)}
    kept.write(tmp_path / "new" / "x.safetensors", tensors, FACTS)
    found = kept.read(tmp_path / "new" / "x.safetensors", FACTS)
    assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }


@pytest.mark.parametrize("name", FACTS)
def test_what_was_kept_of_something_else_is_refused_by_its_name(tmp_path, name):
    file = tmp_path / "x.safetensors"
    kept.write(file, {"ids": torch.arange(3)}, FACTS)
    with pytest.raises(DataError, match=rf"was made with another {name}: '.{{16}}', not 'cccc") as caught:
        kept.read(file, FACTS | {name: "c" * 64})
    assert caught.value.number == 445
    assert kept.name_of(FACTS) != kept.name_of(FACTS | {name: "c" * 64})
    with pytest.raises(DataError, match=r"another seed: nothing, not '1'"):
        kept.read(file, FACTS | {"seed": "1"})


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    kept.write(file, {"ids": torch.arange(100)}, FACTS)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        kept.read(file, FACTS)
    file.write_bytes(data[:40])
    with pytest.raises(DataError, match="cannot be read"):
        kept.read(file, FACTS)
