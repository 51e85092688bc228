"""Text and windows: the parts share nothing, protocols are exact, wrong input is named, nothing repeats silently."""

from __future__ import annotations

import codecs
import json
import socket
import time
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quantforge import network
from quantforge.calibrate import hub, python_docs, text_files
from quantforge.calibrate.corpus import SOURCES, Text, load_documents, load_text, set_names, windows
from quantforge.calibrate.text_files import Reading
from quantforge.errors import DataError, RecipeError
from quantforge.resources import KINDS, build, definitions, read_mapping

RUN = 50


def runs(text: str) -> set[str]:
    return {text[i : i + RUN] for i in range(len(text) - RUN + 1)}


def byte_tokenizer(bos: bool = False) -> Any:
    """Return a tokenizer with one token per byte; its ids are ranks of the byte alphabet, <s> is 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=16)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# python-docs


def test_the_two_parts_of_python_docs_share_no_run_of_50_characters(no_network: None) -> None:
    calibration = load_text("python-docs", "calibration")
    evaluation = load_text("python-docs", "evaluation")
    assert not runs(calibration.text) & runs(evaluation.text)
    assert len(calibration.text.encode()) >= 200_000
    assert len(evaluation.text.encode()) >= 110_000
    assert (calibration.name, calibration.part, evaluation.part) == ("python-docs", "calibration", "evaluation")
    assert "CPython 3." in calibration.source


def test_python_docs_is_the_same_text_every_time_and_repeats_no_paragraph() -> None:
    for part in ("calibration", "evaluation"):
        text = load_text("python-docs", part).text
        assert text == load_text("python-docs", part).text
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        assert len(set(paragraphs)) == len(paragraphs)


def test_the_order_of_topics_plays_no_part() -> None:
    from pydoc_data.topics import topics

    some = dict(sorted(topics.items())[:20])
    assert python_docs.split(some) == python_docs.split(dict(reversed(some.items())))


words = st.text("ab \n", max_size=200)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text("xyz", min_size=1, max_size=3), words, max_size=8))
def test_no_topics_make_the_parts_share_a_run(topics: dict[str, str]) -> None:
    first, second = python_docs.split({name: text * 3 for name, text in topics.items()})
    assert not runs(first) & runs(second)


def test_a_run_that_only_joining_makes_is_found() -> None:
    tail, head = "e" * 30, "f" * 30
    assert python_docs._without_runs_of(f"{tail}\n\n{head}", [tail, head, "g"]) == f"{tail}\n\ng"
    assert python_docs._without_runs_of("e" * 49 + "\nX", ["e" * 49, "g"]) == "e" * 49


def test_a_python_without_its_reference_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data.*\.txt"):
        load_text("python-docs", "calibration")


# sets on the hub


class Loader:
    """Stands in for datasets.load_dataset: returns `rows` and remembers how it was called."""

    def __init__(self, rows: dict[str, list[Any]]) -> None:
        self.rows = rows
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> datasets.Dataset:
        self.calls.append((args, kwargs))
        return datasets.Dataset.from_dict(self.rows)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None) -> Callable[..., Loader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def install(**rows: list[Any]) -> Loader:
        loader = Loader(rows)
        monkeypatch.setattr(datasets, "load_dataset", loader)
        return loader

    return install


PARQUET = "refs/convert/parquet"
PROTOCOLS = [
    ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "train", None, None, "text", "\n\n"),
    ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test", None, None, "text", "\n\n"),
    ("ptb", "calibration", ("ptb-text-only/ptb_text_only", None), "train",
     {"train": "penn_treebank/train/0000.parquet"}, PARQUET, "sentence", " "),
    ("ptb", "evaluation", ("ptb-text-only/ptb_text_only", None), "test",
     {"test": "penn_treebank/test/0000.parquet"}, PARQUET, "sentence", " "),
    ("c4", "calibration", ("allenai/c4", None), "train",
     {"train": "en/c4-train.00000-of-01024.json.gz"}, None, "text", "\n\n"),
    ("c4", "evaluation", ("allenai/c4", None), "validation",
     {"validation": "en/c4-validation.00000-of-00008.json.gz"}, None, "text", " "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "where", "split", "files", "revision", "field", "join"), PROTOCOLS)
def test_a_hub_set_asks_for_its_split_and_joins_it_as_published(
    stand_in: Callable[..., Loader],
    name: str,
    part: Any,
    where: tuple[str, str | None],
    split: str,
    files: dict[str, str] | None,
    revision: str | None,
    field: str,
    join: str,
) -> None:
    documents = ["", " = A title = \n", "Some words .\n"]
    loader = stand_in(**{field: documents, "other": [1, 2, 3]})
    text = load_text(name, part)
    assert loader.calls == [(where, {"data_files": files, "revision": revision, "split": split})]
    assert text.text == join.join(documents)
    assert (text.name, text.part) == (name, part)
    assert where[0] in text.source


def test_c4_takes_1100_documents_and_scores_256_windows(stand_in: Callable[..., Loader]) -> None:
    stand_in(text=[f"d{i:04}" for i in range(1200)])
    text = load_text("c4", "evaluation")
    assert text.text.split(" ") == [f"d{i:04}" for i in range(1100)]
    assert windows(text, byte_tokenizer(), 4).provenance["count"] == 256
    assert windows(text, byte_tokenizer(), 4, 300).provenance["count"] == 300


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"body": ["a"]}, "no column 'text'; it has: body"),
        ({"text": ["a", None]}, "row 1 of Salesforce/wikitext holds no text but NoneType"),
        ({"text": [" \n", ""]}, "evaluation part of 'wikitext2' is empty"),
    ],
)
def test_a_repository_that_changed_is_refused(
    stand_in: Callable[..., Loader], rows: dict[str, list[Any]], message: str
) -> None:
    stand_in(**rows)
    with pytest.raises(DataError, match=message):
        load_text("wikitext2", "evaluation")


def test_whatever_the_library_raises_becomes_one_line(
    stand_in: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as error:
        load_text("ptb", "evaluation")
    assert "'ptb' cannot be loaded from ptb-text-only/ptb_text_only: RuntimeError: first second" in str(error.value)


def test_a_folder_named_like_the_repository_is_not_taken_for_it(stand_in: Callable[..., Loader]) -> None:
    loader = stand_in(text=["a"])
    Path("allenai/c4").mkdir(parents=True)
    with pytest.raises(DataError, match="allenai/c4 stands in the way"):
        load_text("c4", "evaluation")
    assert not loader.calls


def assert_says_what_works(error: DataError) -> None:
    for word in ("python-docs", ".txt", ".jsonl"):
        assert word in str(error)


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("load_dataset was called")

    monkeypatch.setattr(datasets, "load_dataset", fail)


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "never answers"])
def test_without_network_a_hub_set_says_so_soon(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    forbid_loading(monkeypatch)
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(network.reachable, "__defaults__", (0.3,))
    if not silent:
        server.close()
    start = time.monotonic()
    with pytest.raises(DataError, match=r"'wikitext2'.*cannot be reached") as error:
        load_text("wikitext2", "evaluation")
    assert time.monotonic() - start < 10
    assert_says_what_works(error.value)
    server.close()


def test_the_probe_itself_leaves_room_within_ten_seconds() -> None:
    assert 0 < network.PROBE_SECONDS <= 6
    assert network.reachable.__defaults__ == (network.PROBE_SECONDS,)


@pytest.mark.parametrize(("status", "answer"), [(200, True), (404, True), (503, False)])
def test_any_answer_but_a_server_error_means_reachable(
    monkeypatch: pytest.MonkeyPatch, status: int, answer: bool
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> Any:
            assert url == huggingface_hub.constants.ENDPOINT
            return type("Response", (), {"status_code": status})

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert network.reachable() is answer


def test_the_probe_does_not_wait_for_a_client_that_ignores_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    over = Event()

    class Session:
        def head(self, url: str, timeout: float) -> Any:
            over.wait(60)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    start = time.monotonic()
    assert not network.reachable(0.1)
    assert time.monotonic() - start < 10
    over.set()


def set_offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_offline_mode_is_respected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None, name: str
) -> None:
    set_offline(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=f"'{name}': HF_HUB_OFFLINE is set") as error:
        load_text(name, "evaluation")
    assert_says_what_works(error.value)


def test_offline_mode_reads_the_local_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    made = datasets.load_dataset("json", data_files={"test": str(rows)}, split="test", cache_dir=str(tmp_path / "made"))
    (arrow,) = (Path(file["filename"]) for file in made.cache_files)
    cached = tmp_path / "cache/Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/0123abcd"
    cached.mkdir(parents=True)
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info |= {"config_name": "wikitext-2-raw-v1", "dataset_name": "wikitext"}
    for split in info["splits"].values():
        split["dataset_name"] = "wikitext"
    (cached / "dataset_info.json").write_text(json.dumps(info))
    (cached / "wikitext-test.arrow").write_bytes(arrow.read_bytes())
    set_offline(monkeypatch, tmp_path / "cache")
    assert load_text("wikitext2", "evaluation").text == "one\n\ntwo"


def test_without_datasets_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets") as error:
        load_text("c4", "calibration")
    assert_says_what_works(error.value)


# definitions


def test_all_definitions_are_valid_and_every_set_has_both_parts() -> None:
    assert set_names() == ["c4", "ptb", "python-docs", "wikitext2"]
    for kind in KINDS:
        assert list(definitions(kind)) == set_names()
        for path in definitions(kind).values():
            values = read_mapping(path)
            spec = build(SOURCES[values.pop("source")], values, path.name)
            assert spec.about
            assert spec.licence


def test_calibration_and_evaluation_never_use_the_same_split() -> None:
    for name in ("c4", "ptb", "wikitext2"):
        splits = [read_mapping(definitions(kind)[name])["split"] for kind in KINDS]
        assert len(set(splits)) == 2
        assert splits[0] == "train"


@pytest.mark.parametrize("repository", ["wikitext", "../../etc", "./a/b", "/a/b", "a/b/c", "a/", "https://x/y"])
def test_only_owner_and_name_make_a_repository(repository: str) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        hub.HubText("a", "l", repository, "train", "text", " ")


@pytest.mark.parametrize("source", ["source: web\n", "source: 3\n", ""])
def test_an_unknown_source_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"about: x\nlicence: y\n{source}")
    monkeypatch.setattr("quantforge.calibrate.corpus.definitions", lambda kind: {"mine": path})
    with pytest.raises(DataError, match=r"mine\.yaml: source must be one of python, hub"):
        load_text("mine", "evaluation")


def test_a_set_without_the_part_asked_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"calib": {"half": Path("half.yaml")}, "eval": {"whole": Path("whole.yaml")}}
    monkeypatch.setattr("quantforge.calibrate.corpus.definitions", known.__getitem__)
    with pytest.raises(DataError, match="'half' has no evaluation part; these have one: whole"):
        load_text("half", "evaluation")


# files


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_txt_file_is_one_text_as_it_is_but_for_its_line_ends(tmp_path: Path, no_network: None, end: str) -> None:
    path = tmp_path / "a.txt"
    content = "  first\n\n\n\tübergröße \u2028 x\n "
    path.write_bytes(content.replace("\n", end).encode())
    text = load_text(str(path), "calibration")
    assert (text.text, text.part, text.name) == (content, "file", str(path))
    assert text == load_text(str(path), "evaluation")
    assert text.sha256 == sha256(content.encode()).hexdigest()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".TXT"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    content = '{"text": "abc"}'
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_text(str(path), "calibration").text == ("abc" if suffix == ".jsonl" else content)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5))
@example(["a", "line\u2028separator\x85next line"])
def test_jsonl_joins_the_field_text_by_an_empty_line(tmp_path_factory: Any, documents: list[str]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    rows = [json.dumps({"text": d, "id": i}, ensure_ascii=i % 2 == 0) for i, d in enumerate(documents)]
    path.write_bytes("\n".join([*rows, ""]).encode())
    if "\n\n".join(documents).strip():
        assert load_text(str(path), "evaluation").text == "\n\n".join(documents)
    else:
        with pytest.raises(DataError, match="empty"):
            load_text(str(path), "evaluation")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text: 1}", "line 3, is not JSON"),
        ('{"text": "a"', "line 3, is not JSON"),
        ("[" * 100_000, "line 3, is not JSON"),
        ('{"content": "a", "id": 1}', "line 3, has no field 'text'; it has: 'content', 'id'"),
        ("{}", "line 3, has no field 'text'; it has: nothing"),
        ('["text"]', "line 3, has no field 'text'; it has: list"),
        ('{"text": 7}', "line 3: the field 'text' must be a string, not 7"),
        ('{"text": null}', "line 3: the field 'text' must be a string, not None"),
        ('{"text": NaN}', "line 3: the field 'text' must be a string, not nan"),
        ('{"text": {"text": "a"}}', "line 3: the field 'text' must be a string, not {'text': 'a'}"),
        ('{"text": ' + "9" * 5000 + "}", "line 3, is not JSON"),
        ('{"text": ' + '{"a":' * 50_000 + "1" + "}" * 50_001, "line 3, is not JSON"),
        ('{"text": "ab\\ud800"}', "line 3: character 2 of 'text' is half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError) as error:
        load_text(str(path), "calibration")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\r\n", "is empty"),
        ("a.txt", b"\xef\xbb\xbf", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", b"abc\xe9def", "not UTF-8: bad byte at position 3"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8: bad byte at position 10"),
        ("a.txt", "h\xe9".encode("utf-16"), "not UTF-8: bad byte at position 0"),
        ("a.txt", b"ab\0c", "NUL characters, the first at 2"),
        ("a.jsonl", b'{"text": "ab\\u0000"}', "NUL characters, the first at 2"),
        ("a.jsonl.gz", b"x", "ends in '.gz'; accepted are sets (c4, ptb, python-docs, wikitext2) and files"),
        ("a.zip", b"x", "ends in '.zip'"),
        ("a.parquet", b"x", "ends in '.parquet'"),
        ("a.json", b"x", "ends in '.json'"),
        ("a", b"x", "ends in ''"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_text(str(tmp_path / name), "calibration")
    assert message in str(error.value)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x1f\x8b\x08", "gzip data"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x28\xb5\x2f\xfd", "zstandard data"),
        (b"\xfd7zXZ\x00", "xz data"),
        (b"PAR1", "a parquet table"),
        (b"ARROW1\x00\x00", "an arrow table"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_what_is_compressed_or_a_table_is_named_whatever_the_file_is_called(
    tmp_path: Path, start: bytes, what: str, suffix: str
) -> None:
    """None is ever unpacked, so none can swell."""
    (tmp_path / f"a{suffix}").write_bytes(start + bytes(100))
    with pytest.raises(DataError, match=f"is {what}, not text: unpack or export it") as error:
        load_text(str(tmp_path / f"a{suffix}"), "calibration")
    assert error.value.exit_code == 4


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**31)
    start = time.monotonic()
    with pytest.raises(DataError, match="has 2,147,483,648 bytes; at most 1,073,741,824 are read: cut it"):
        load_text(str(tmp_path / "a.txt"), "calibration")
    assert time.monotonic() - start < 10


def test_a_line_beyond_the_limit_is_named_before_it_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", 1000)
    monkeypatch.setattr(text_files, "MAX_LINE", 5000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "x" * 4_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 2, has more than 5,000 characters"):
        load_text(str(path), "calibration")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_many_lines_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is the text that comes out, not the lines that it is taken from."""
    monkeypatch.setattr(text_files, "_CHUNK", 2**16)
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "a", "more": "x" * 400}) + "\n"
    path.write_text(line * 20_000)
    tracemalloc.start()
    text = load_text(str(path), "calibration").text
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text == "\n\n".join("a" * 20_000)
    assert peak < path.stat().st_size / 4


@given(st.binary(max_size=40), st.integers(1, 7))
@example(b"\xef\xbb\xbfa\r\nb\rc\n\xc3\xa9", 1)
@example(b"abc\xe6\x9d", 3)
@example("\u00e9\u6771\U0001f600".encode() + b"\xff", 2)
def test_a_file_read_in_pieces_is_the_file_as_a_whole(tmp_path_factory: Any, content: bytes, size: int) -> None:
    """Its text is what it would be at once, and a bad byte stands where it would be found at once."""
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    content = b"." + content if content.startswith(tuple(text_files._BINARY)) else content
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", size)
        try:
            expected = content.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            with pytest.raises(DataError, match=f"bad byte at position {error.start};"):
                list(text_files._pieces(str(path)))
        else:
            assert "".join(text_files._pieces(str(path))) == expected
            assert list(text_files._lines(str(path))) == expected.split("\n")


@given(
    st.sampled_from(["cp1252", "utf-16", "utf-16-le", "shift-jis", "utf-8"]),
    st.sampled_from(text_files.ERRORS),
    st.binary(max_size=40),
    st.integers(1, 7),
)
@example("utf-16", "strict", "\u00e9\r\n\u6771".encode("utf-16-le"), 1)
@example("utf-8", "replace", b"abc\xe6\x9d", 2)
@example("utf-16-le", "strict", "\ufeffa".encode("utf-16-le"), 3)
def test_an_encoding_and_replacement_are_python_s_own_whatever_the_pieces(
    tmp_path_factory: Any, encoding: str, errors: str, content: bytes, size: int
) -> None:
    path = tmp_path_factory.mktemp("encodings") / "a.txt"
    content = codecs.BOM_UTF16 + content if encoding == "utf-16" else content  # without it the order is not known
    content = b"." + content if content.startswith(tuple(text_files._BINARY)) else content
    path.write_bytes(content)
    how = Reading(encoding, errors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", size)
        try:
            expected = content.decode(encoding, errors).removeprefix("\ufeff")
        except UnicodeDecodeError:
            with pytest.raises(DataError, match=f"is not {encoding.upper()}: bad byte at position .*--encoding"):
                list(text_files._pieces(str(path), how))
        else:
            found = "".join(text_files._pieces(str(path), how))
            assert found == expected.replace("\r\n", "\n").replace("\r", "\n")


def test_what_a_text_was_read_as_stands_in_its_source(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 \x81")
    with pytest.raises(DataError, match="is not CP1252: bad byte at position 5; "):
        load_text(str(path), "calibration", Reading("cp1252"))
    found = load_text(str(path), "calibration", Reading("cp1252", "replace"))
    assert (found.text, found.source) == ("café \ufffd", "the file a.txt, in cp1252, with bad bytes replaced")
    assert load_text(str(path), "calibration", Reading("latin-1")).source == "the file a.txt, in latin-1"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"encoding": "utf-9"}, "no encoding is called 'utf-9': did you mean 'utf-"),
        ({"encoding": "base64"}, "no encoding is called 'base64'"),
        ({"encoding": "a\0b"}, "no encoding is called"),
        ({"encoding": ""}, "no encoding is called ''"),
        ({"errors": "ignore"}, "one of strict, replace, not 'ignore'"),
        ({"bad_lines": -1}, "at least 0, not -1"),
    ],
)
def test_impossible_ways_to_read_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        Reading(**how)
    assert message in str(error.value)


def test_an_encoding_that_says_half_a_pair_is_an_error_not_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"+2AA-")
    with pytest.raises(DataError, match="is not UTF-7"):
        load_text(str(path), "calibration", Reading("utf-7"))


def test_bad_lines_are_left_out_as_many_as_allowed_and_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": 7}\n\n[1\n{"text": "two"}\n{"txt": ""}\n')
    for allowed, number, place in ((0, 1, 2), (1, 2, 4), (2, 3, 6)):
        with pytest.raises(DataError) as error:
            load_text(str(path), "calibration", Reading(bad_lines=allowed))
        assert f"line {place}" in str(error.value)
        assert str(error.value).endswith(f"--bad-lines N leaves out N such lines; this is number {number}.")
    found = load_text(str(path), "calibration", Reading(bad_lines=3))
    assert found.text == "one\n\ntwo"
    assert found.source == "the file a.jsonl, but for 3 lines without text, the first of them line 2"
    documents, provenance = load_documents(str(path), "evaluation", Reading(bad_lines=3))
    assert (documents, provenance["source"]) == (("one", "two"), found.source)


def test_documents_are_the_lines_of_jsonl_that_have_text_and_else_the_whole(tmp_path: Path, no_network: None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n"}\n\n{"text": " "}\n{"text": "two"}\n')
    documents, provenance = load_documents(str(path), "evaluation")
    assert documents == ("one\n", "two")
    assert provenance["name"] == str(path)
    path.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="is empty"):
        load_documents(str(path), "evaluation")
    (whole,), provenance = load_documents("python-docs", "evaluation")
    assert whole == load_text("python-docs", "evaluation").text
    assert (provenance["name"], provenance["part"]) == ("python-docs", "evaluation")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext", "no text set or file is called 'wikitext': did you mean 'wikitext2'?"),
        ("python_docs", "did you mean 'python-docs'?"),
        ("wikitext2.txt", "the file 'wikitext2.txt' does not exist: did you mean 'wikitext2'?"),
        ("no/such/file.txt", "does not exist"),
        ("no.parquet", "files that end in .txt or .jsonl"),
        ("", "folder"),
        (".", "folder"),
        ("x" * 5000 + ".txt", "cannot be read: File name too long"),
    ],
)
def test_a_missing_text_names_the_nearest_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load_text(name, "evaluation")
    assert message in str(error.value)


def test_a_folder_is_refused_even_if_it_ends_in_txt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        load_text(str(tmp_path / "a.txt"), "evaluation")


# windows


def text_of(size: int) -> Text:
    return Text("t", "file", "".join(chr(97 + i % 26) for i in range(size)), "made up")


def test_windows_cut_the_tokens_from_the_start_and_drop_the_tail() -> None:
    text, tokenizer = text_of(50), byte_tokenizer()
    whole = tokenizer(text.text)["input_ids"]
    cut = windows(text, tokenizer, 16)
    assert cut.ids.dtype == torch.int64
    assert cut.ids.tolist() == [whole[0:16], whole[16:32], whole[32:48]]
    assert windows(text, tokenizer, 16, 2).ids.tolist() == [whole[0:16], whole[16:32]]
    assert windows(text, tokenizer, 50).ids.tolist() == [whole]


def test_special_tokens_are_the_tokenizers_own_and_stand_once() -> None:
    ids = windows(text_of(47), byte_tokenizer(bos=True), 16).ids
    assert ids.shape == (3, 16)
    assert (ids == 256).sum() == 1
    assert ids[0, 0] == 256


def test_a_tokenizer_without_special_tokens_needs_none() -> None:
    """Windows are full, so nothing is padded, and nothing is added where the tokenizer adds nothing."""
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    assert bare.bos_token_id is bare.eos_token_id is bare.pad_token_id is None
    assert torch.equal(windows(text_of(50), bare, 16).ids, windows(text_of(50), byte_tokenizer(), 16).ids)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{% this is no template",
    ],
)
def test_a_hostile_chat_template_is_never_filled_in(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a chat template was used")

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", refuse)
    assert windows(text_of(50), tokenizer, 16).ids.shape == (3, 16)


def test_a_long_text_is_not_truncated_and_brings_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    tokenizer = byte_tokenizer()
    assert tokenizer.model_max_length == 16
    logging.enable_propagation()
    try:
        assert windows(text_of(1000), tokenizer, 100).provenance["tokens"] == 1000
        assert not caplog.records
    finally:
        logging.disable_propagation()


def test_too_little_text_says_what_there_is_and_what_is_needed() -> None:
    with pytest.raises(DataError, match="'t' has 15 tokens, one window needs 16"):
        windows(text_of(15), byte_tokenizer(), 16)
    with pytest.raises(DataError, match="'t' has 3 windows of 16 tokens, 4 were asked for"):
        windows(text_of(63), byte_tokenizer(), 16, 4)
    for seq_len, count in ((0, None), (-1, None), (4, 0), (4, -2)):
        with pytest.raises(DataError, match="at least 1"):
            windows(text_of(63), byte_tokenizer(), seq_len, count)


@settings(deadline=None, max_examples=40)
@given(st.integers(20, 300), st.integers(1, 20), st.data())
def test_shuffled_windows_are_distinct_windows_of_the_text(size: int, seq_len: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32))
    count = data.draw(st.integers(1, size // seq_len))
    text = Text("t", "file", "".join(chr(200 + i) for i in range(size)), "made up")

    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    everything = [tuple(row) for row in windows(text, tokenizer, seq_len).ids.tolist()]
    drawn = [tuple(row) for row in windows(text, tokenizer, seq_len, count, shuffle=True, seed=seed).ids.tolist()]
    assert len(set(drawn)) == len(drawn) == count
    assert set(drawn) <= set(everything)
    again = windows(text, tokenizer, seq_len, shuffle=True, seed=seed).ids.tolist()
    assert [tuple(row) for row in again[:count]] == drawn


def test_seeds_differ_and_leave_the_global_random_state_alone() -> None:
    text, tokenizer = text_of(2001), byte_tokenizer()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    draws = [windows(text, tokenizer, 7, 40, shuffle=True, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(draws[0].ids, draws[1].ids)
    assert draws[0].provenance == draws[1].provenance
    assert not torch.equal(draws[0].ids, draws[2].ids)
    assert draws[0].provenance["ids_sha256"] != draws[2].provenance["ids_sha256"]


def test_provenance_is_json_and_says_what_the_windows_are() -> None:
    text = text_of(50)
    cut = windows(text, byte_tokenizer(), 16, 2, shuffle=True, seed=3)
    raw = b"".join(i.to_bytes(8, "little") for row in cut.ids.tolist() for i in row)
    assert json.loads(json.dumps(cut.provenance)) == {
        "name": "t",
        "part": "file",
        "source": "made up",
        "text_sha256": sha256(text.text.encode()).hexdigest(),
        "ids_sha256": sha256(raw).hexdigest(),
        "tokens": 50,
        "seq_len": 16,
        "count": 2,
        "shuffle": True,
        "seed": 3,
    }
