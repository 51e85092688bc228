"""Kept references: read as they were written, refused when they are another's, and made once."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantforge import kept as files
from quantforge.errors import DataError, ResourceError
from quantforge.evaluation import reference as references
from quantforge.evaluation.divergence import top_k
from quantforge.evaluation.perplexity import evaluate, make_reference
from quantforge.evaluation.reference import DENSE, Made, Reference, digest, made
from quantforge.models import tiny

WINDOWS, LENGTH = 3, 5


def tokens(vocab: int = 128, seed: int = 0) -> Tensor:
    return torch.randint(3, vocab, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def kept(vocab: int = 20) -> tuple[Reference, Made]:
    logits = 3 * torch.randn(WINDOWS * (LENGTH - 1), vocab, generator=torch.Generator().manual_seed(0))
    return Reference(top_k(logits, 4), (1.5, 2.5, 0.1)), replace(made("float-1", tokens(vocab), vocab), k=4)


def same(one: Reference, other: Reference) -> bool:
    a, b = one.kept, other.kept
    pairs = ((a.ids, b.ids), (a.log_probs, b.log_probs), (a.top, b.top))
    return (one.losses, a.vocab) == (other.losses, b.vocab) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs
    )


@pytest.mark.parametrize("vocab", [20, 2**16 + 1])
def test_a_reference_is_read_as_it_was_written(vocab, tmp_path):
    reference, what = kept(vocab)
    file = tmp_path / "cache" / "reference.safetensors"
    for _ in range(2):  # the second replaces the first
        references.save(file, reference, what)
        assert same(references.load(file, what), reference)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_window_is_its_part_of_the_predictions():
    reference, _ = kept()
    assert torch.equal(torch.cat([reference.window(i).ids for i in range(WINDOWS)]), reference.kept.ids)
    assert torch.equal(reference.window(1).top, reference.kept.top[4:8])


@pytest.mark.parametrize("field", [field.name for field in fields(Made)])
def test_a_reference_of_another_model_text_or_shape_is_refused_by_name(field, tmp_path):
    reference, what = kept()
    file = tmp_path / "reference.safetensors"
    references.save(file, reference, what)
    value = getattr(what, field)
    other = value + 1 if isinstance(value, int) else "0" * 64
    said = rf"'reference\.safetensors'.* another {field}: '{str(value)[:16]}', not '{str(other)[:16]}'"
    with pytest.raises(DataError, match=said) as caught:
        references.load(file, replace(what, **{field: other}))
    assert "\n" not in str(caught.value)


def test_tensors_that_are_not_what_the_facts_say_are_refused(tmp_path):
    reference, what = kept()
    file = tmp_path / "reference.safetensors"
    references.save(file, reference, what)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    changes = {
        "ids is missing": {name: tensors[name] for name in tensors if name != "ids"},
        r"log_probs is torch.float32 of shape \[12, 4\]": {**tensors, "log_probs": torch.zeros(12, 4)},
        "top is torch.int64": {**tensors, "top": tensors["top"].long()},
    }
    facts = {name: value for name, value in metadata.items() if name != "content"}
    for message, changed in changes.items():
        files.write(file, changed, facts)
        with pytest.raises(DataError, match=message):
            references.load(file, what)
    save_file({**tensors, "losses": tensors["losses"] * 1.001}, file, metadata=metadata)
    with pytest.raises(DataError, match="damaged"):
        references.load(file, what)
    files.write(file, tensors, {**facts, "schema": "quantforge-reference-0"})
    with pytest.raises(DataError, match="another schema: 'quantforge-refer"):
        references.load(file, what)


def rewritten(file: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, file)  # without the metadata


def flipped(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no tensors"),
    "one byte": flipped,
    "no metadata": rewritten,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_damaged_or_something_else_are_refused(damage, tmp_path):
    reference, what = kept()
    file = tmp_path / "reference.safetensors"
    references.save(file, reference, what)
    DAMAGES[damage](file)
    with pytest.raises(DataError, match=r"'reference\.safetensors'") as caught:
        references.load(file, what)
    assert "\n" not in str(caught.value)


def test_a_reference_that_cannot_be_written_is_an_error_in_one_line(tmp_path):
    reference, what = kept()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="could not be written"):
        references.save(tmp_path / "file" / "reference.safetensors", reference, what)


def test_the_digest_tells_texts_apart_but_not_types():
    ids = tokens()
    assert digest(ids) == digest(ids.int())
    assert digest(ids) != digest(ids.flip(0))


def test_a_reference_is_made_once_and_again_only_if_it_is_damaged(tmp_path):
    reference, what = kept()
    calls: list[int] = []

    def make() -> Reference:
        calls.append(1)
        return reference

    for damage in (None, None, *(d for d in DAMAGES if d != "gone"), "gone", None):
        if damage:
            DAMAGES[damage](next(tmp_path.glob("*.safetensors")))
        assert same(references.get(tmp_path, what, make), reference)
    assert len(calls) == 1 + len(DAMAGES)
    references.get(tmp_path, replace(what, model="float-2"), make)
    assert len(calls) == 2 + len(DAMAGES)
    assert len(list(tmp_path.iterdir())) == 2


def test_where_nothing_can_be_kept_a_reference_is_made_each_time(tmp_path):
    reference, what = kept()
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file"):
        assert references.get(folder, what, lambda: reference) is reference


def test_a_reference_from_a_file_gives_the_same_divergence_and_gap(tmp_path):
    model, ids = tiny.make("llama"), tokens()
    reference, _ = make_reference(model, ids, k=8)
    worse = tiny.make("llama", seed=1)
    what = replace(made("m", ids, 128), k=8)
    references.save(tmp_path / "reference.safetensors", reference, what)
    read = references.load(tmp_path / "reference.safetensors", what)
    assert evaluate(worse, ids, read).gap is None
    whole = replace(read, dense=make_reference(model, ids[:DENSE], k=1)[0].dense)
    assert evaluate(worse, ids, whole) == evaluate(worse, ids, reference)
