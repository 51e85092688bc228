"""Files that are written tensor by tensor are those that safetensors writes of all tensors at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantforge import shards, store
from quantforge.errors import ResourceError

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.complex64,
    ),
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
kinds = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3))


def tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 7).reshape(shape).to(dtype)


@given(st.dictionaries(names, kinds, max_size=8))
@settings(deadline=None)
def test_a_file_is_the_same_bytes_as_safetensors_own(tmp_path_factory, facts):
    tensors = {name: tensor(*kind) for name, kind in facts.items()}
    place = tmp_path_factory.mktemp("files")
    save_file(tensors, place / "theirs", {"format": "pt"})
    shards.write(place, tensors.items())
    assert (place / shards.WHOLE).read_bytes() == (place / "theirs").read_bytes()
    assert {p.name for p in place.iterdir()} == {"theirs", shards.WHOLE}


def test_tensors_that_are_turned_or_parts_of_others_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    shards.write(tmp_path, [("turned", whole.T), ("part", whole[1:, 1:]), ("one", torch.tensor(3.0))])
    found = load_file(tmp_path / shards.WHOLE)
    assert torch.equal(found["turned"], whole.T)
    assert torch.equal(found["part"], whole[1:, 1:])
    assert found["one"].shape == ()


def test_a_file_ends_before_the_tensor_that_would_exceed_the_limit(tmp_path):
    shards.write(tmp_path, ((str(i), torch.full((10,), float(i))) for i in range(5)), limit=80)
    sizes = [len(load_file(p)) for p in sorted(tmp_path.glob("*.safetensors"))]
    assert sizes == [2, 2, 1]
    assert (tmp_path / shards.INDEX).exists()


def test_no_more_than_a_tensor_is_held(tmp_path):
    alive: list[int] = []

    class Held:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    highest = 0

    def come():
        nonlocal highest
        for i in range(6):
            one = torch.zeros(10)
            one.mark = Held()
            highest = max(highest, len(alive))
            yield str(i), one
            del one

    shards.write(tmp_path, come())
    assert highest <= 2


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_FAILPOINT", "stream.write:2:ENOSPC")
    store.failpoints.reset()
    with pytest.raises(ResourceError, match="No space left"):
        shards.write(tmp_path, [("a", torch.zeros(3)), ("b", torch.zeros(3))])
    assert not list(tmp_path.iterdir())
