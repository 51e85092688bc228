"""A safetensors file is read exactly when the format allows it; everything else is one line, never a traceback."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantforge.errors import ModelError
from quantforge.models import headers
from quantforge.models.headers import BITS, read_header, read_json, show, some

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
GOOD = {"a.weight": A, "b.weight": B}


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file with this header (text, bytes or an object) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


VALID = pack({"__metadata__": {"format": "pt"}, **GOOD}, bytes(32))


def one(**changes: Any) -> bytes:
    """Return a file with the tensor a.weight of 24 bytes, changed."""
    return pack({"a.weight": {**A, **changes}}, bytes(24))


DAMAGED = {
    "empty": (b"", "no header"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "no header"),
    "header length 0": (pack(b"", bytes(8)), "no header"),
    "header longer than the file": (pack(GOOD, bytes(32), length=10_000), "truncated"),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", "100,000,000"),
    "truncated by one byte": (VALID[:-1], "truncated"),
    "truncated to the header": (VALID[:-32], "truncated"),
    "one byte too many": (VALID + b"\0", "end at"),
    "zip appended": (VALID + b"PK\3\4" + bytes(200), "end at"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "UTF-8"),
    "not JSON": (pack(b"{oops}"), "JSON"),
    "a list": (pack(b"[1, 2]"), "begin with '{'"),
    "space before the brace": (pack(b' {"a": 1}'), "begin with '{'"),
    "two objects": (pack(b"{}{}"), "JSON"),
    "nested 100,000 deep": (pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested"),
    "number of 10,000 digits": (pack(b'{"a": ' + b"9" * 10_000 + b"}"), "JSON"),
    "duplicate tensor": (pack(b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2), bytes(24)), "'a' twice"),
    "duplicate field": (pack(b'{"a": {"dtype": "F32", "dtype": "I32"}}'), "'dtype' twice"),
    "name that is no Unicode": (pack(b'{"\\ud800": %s}' % json.dumps(A).encode(), bytes(24)), "Unicode"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry is a number": (pack({"a.weight": 1}), "'a.weight'"),
    "field missing": (pack({"a.weight": {"dtype": "F32", "shape": [0]}}), "data_offsets"),
    "field too many": (one(extra=1), "'a.weight' must have exactly"),
    "dtype unknown": (one(dtype="F33"), "'F33'"),
    "dtype is a list": (one(dtype=["F32"]), "unknown dtype"),
    "shape not a list": (one(shape="23"), "shape"),
    "shape negative": (one(shape=[-2, -3]), "shape"),
    "shape of booleans": (one(shape=[True, 6]), "shape"),
    "shape of floats": (one(shape=[2.0, 3]), "shape"),
    "shape too large": (one(shape=[2, 4]), "needs 32 bytes but holds 24"),
    "shape overflows": (one(shape=[2**62, 2**62]), "2^63"),
    "shape overflows to 24 bytes in 64 bits": (one(shape=[2**62 + 6]), "needs"),
    "shape overflows beside a 0": (one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "2^63"),
    "shape of 200,000 large sizes": (one(shape=[2**62] * 200_000), "2^63"),
    "part of a byte": (one(dtype="F4", shape=[49]), "needs 24.5 bytes"),
    "offsets of three": (one(data_offsets=[0, 12, 24]), "data_offsets"),
    "offsets negative": (one(data_offsets=[-24, 0]), "data_offsets"),
    "offsets of booleans": (one(dtype="I8", shape=[1], data_offsets=[False, True]), "data_offsets"),
    "offsets reversed": (one(data_offsets=[24, 0]), "holds -24"),
    "offsets beyond the file": (one(data_offsets=[2**60, 2**60 + 24]), "truncated"),
    "overlap": (pack({"a": A, "b": {**A, "data_offsets": [12, 36]}}, bytes(36)), "'b' overlaps"),
    "same bytes twice": (pack({"a": A, "b": A}, bytes(24)), "'b' overlaps"),
    "hole": (pack({"a": A, "b": {**A, "data_offsets": [25, 49]}}, bytes(49)), "'b' leaves a hole"),
    "hole at the beginning": (pack({"a": {**A, "data_offsets": [1, 25]}}, bytes(25)), "'a' leaves a hole"),
    "git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run git lfs pull"),
}


def refused(file: Path) -> str:
    """Return the message with which `file` is refused, having checked that it is one line that names the file."""
    with pytest.raises(ModelError) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.startswith(f"error[QF-{caught.value.number}]: ")
    assert 301 <= caught.value.number < 350
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    assert file.name in message
    return message


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, expected = DAMAGED[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refused(tmp_path / "model.safetensors")
    assert expected in message
    assert any(remedy in message for remedy in ("download the file again", "git lfs pull"))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for size in range(len(VALID)):
        (tmp_path / "m.safetensors").write_bytes(VALID[:size])
        refused(tmp_path / "m.safetensors")


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "mask": torch.ones(7, dtype=torch.bool),
        "../../etc/passwd\n\0": torch.arange(4),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    header = read_header(file)
    assert header.keys() == tensors.keys()
    raw = file.read_bytes()
    for name, info in header.items():
        assert info.file == file
        assert info.shape == tuple(tensors[name].shape)
        stored = raw[info.start : info.stop]
        assert stored == tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_of_the_library_has_its_size(tmp_path: Path) -> None:
    for dtype, bits in BITS.items():
        file = tmp_path / "m.safetensors"
        file.write_bytes(pack({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits)))
        assert read_header(file)["x"].stop - read_header(file)["x"].start == bits
        with safe_open(file, "pt") as library:
            assert library.get_slice("x").get_dtype() == dtype


def test_padding_and_no_tensors_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(pack(b"{}   "))
    assert read_header(file) == {}


def test_a_huge_sparse_file_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(pack({"x": {"dtype": "I8", "shape": [2**40], "data_offsets": [0, 2**40]}}))
    os.truncate(file, file.stat().st_size + 2**40)
    assert read_header(file)["x"].shape == (2**40,)
    os.truncate(file, file.stat().st_size - 1)
    assert "truncated" in refused(file)


def test_bloat_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(pack(b'{"a":[' + b"[]," * headers.MAX_ITEMS + b"[]]}"))
    monkeypatch.setattr(headers.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    assert "more shards" in refused(file)


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)]
)
def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "model.safetensors")


def test_json_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}".ljust(101))
    with pytest.raises(ModelError, match="101 bytes, more than the 100"):
        read_json(tmp_path / "config.json", 100)
    assert read_json(tmp_path / "config.json", 101) == {}


@given(st.text())
def test_names_are_shown_without_control_characters(name: str) -> None:
    shown = show(name)
    assert shown.isprintable()
    assert len(shown) <= 80
    if len(name) < 70 and name.isprintable():
        assert name in shown or "'" in name or "\\" in name


def test_long_lists_are_counted() -> None:
    assert some("abc") == "a, b, c"
    assert some("abcdefg") == "a, b, c, d, e and 2 more"


def agrees(file: Path, content: bytes) -> None:
    """Read `content`: either ModelError, or the same tensors that the library sees."""
    file.write_bytes(content)
    try:
        ours = read_header(file)
    except ModelError:
        return
    try:
        with safe_open(file, "pt") as library:
            theirs = {name: tuple(library.get_slice(name).get_shape()) for name in library.keys()}  # noqa: SIM118
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we accept: {error}: {content!r}")
    assert theirs == {name: info.shape for name, info in ours.items()}


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None, max_examples=200)
def test_random_bytes_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, framed: bool
) -> None:
    agrees(tmp_path_factory.getbasetemp() / "random.safetensors", pack(raw) if framed else raw)


edits = st.lists(st.tuples(st.integers(0, len(VALID) - 33), st.integers(0, 255)), min_size=1, max_size=4)


@given(edits, st.integers(-3, 3))
@settings(deadline=None, max_examples=400)
@example([(8, 123)], 0)
def test_a_mutated_header_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], extra: int
) -> None:
    content = bytearray(VALID)
    for position, value in edits:
        content[position] = value
    tail = bytes(content) + bytes(extra) if extra >= 0 else bytes(content)[:extra]
    agrees(tmp_path_factory.getbasetemp() / "mutated.safetensors", tail)


leaf = (
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.floats() | st.text(max_size=5) | st.sampled_from(list(BITS))
)
anything = st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
entry = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*BITS, "X"]) | anything, "shape": st.lists(st.integers(0, 4)) | anything},
    optional={"data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | anything, "x": anything},
)


@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entry | anything, max_size=3), st.integers(0, 64))
@settings(deadline=None, max_examples=400)
def test_random_json_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    agrees(tmp_path_factory.getbasetemp() / "json.safetensors", pack(header, bytes(size)))
