"""Tokenizers in GGUF files: stock transformers reads them back to the same tokens, and llama.cpp's names are right."""

import gguf
import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from quantforge.exporters.gguf import FILE, Gguf, vocabulary
from quantforge.models.load import quiet

TEXTS = (
    "Hello world, it's 12345 o'clock!",
    "  two  spaces\n\nand\tlines ",
    "naïve café — 東京 🙂",
    "I'LL go</s>on",
    "<tool>x",
)
LLAMA3 = PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex, *more):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), *more])


WAYS = {
    "gpt-2": (WORDS, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), WORDS]), False),
    "llama-bpe": (split(LLAMA3, BYTES), True),
    "dbrx": (split(LLAMA3, BYTES), False),
    "qwen2": (split(PRETOKENIZE_REGEX, BYTES), False),
    "default": (split(r"\s+|\S+", BYTES), False),
}


def byte_level(way="gpt-2", **roles):
    """Return a byte-level tokenizer that was trained on `TEXTS`, with two control tokens and an added one."""
    cut, whole = WAYS[way]
    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    roles = {"bos_token": "<s>", "eos_token": "</s>", **roles}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def sentencepiece(prefix=True):
    """Return a tokenizer of the kind that llama 2 has, with all bytes to fall back on."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(["▁" + text for text in TEXTS[:3]] * 3, trainers.BpeTrainer(vocab_size=120))
    merged = [
        tuple(m) for m in vocabulary._described(PreTrainedTokenizerFast(tokenizer_object=trained))["model"]["merges"]
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(a + b for a, b in merged)]
    tokens += sorted({c for pair in merged for c in "".join(pair)})
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab, merged, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def written(folder, tokenizer, rows=400, arch="llama"):
    """Write a file that holds nothing but a vocabulary → its keys."""
    writer = gguf.GGUFWriter(folder / FILE, arch)
    writer.add_block_count(1)
    vocabulary.write(writer, tokenizer, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.GGUFReader(folder / FILE).fields
    return {k.removeprefix("tokenizer."): f.contents() for k, f in found.items() if k.startswith("tokenizer.")}


@pytest.mark.parametrize("way", WAYS)
def test_the_way_of_cutting_words_has_llama_cpps_name(way, tmp_path):
    found = written(tmp_path, byte_level(way))
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", way)
    assert bool(vocabulary.notes(byte_level(way))) == (way == "default")


@pytest.mark.parametrize("way", ["gpt-2", "llama-bpe", "qwen2"])
def test_stock_transformers_reads_the_same_tokens(way, tmp_path):
    own = byte_level(way)
    written(tmp_path, own)
    with quiet():
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    for text in TEXTS:
        assert read(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids
        assert read.decode(own(text).input_ids) == text
    assert (read.bos_token, read.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_put_merges_in_their_order(prefix, tmp_path):
    own = sentencepiece(prefix)
    found = written(tmp_path, own)
    assert (found["ggml.model"], found["ggml.pre"], found["ggml.add_space_prefix"]) == ("llama", "default", prefix)
    with quiet():
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    orders = [list(dict.fromkeys("".join(m) for m in vocabulary._described(t)["model"]["merges"])) for t in (own, read)]
    assert orders[0] == orders[1]
    if prefix:
        for text in TEXTS[:3]:
            assert read(text.strip(), add_special_tokens=False).input_ids == own(text.strip())["input_ids"][1:]
    kinds = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"]) == (TokenType.UNKNOWN, TokenType.CONTROL)
    assert (kinds["<0x0A>"], kinds["▁"]) == (TokenType.BYTE, TokenType.NORMAL)
    assert "ggml.merges" not in found


def test_every_key_of_a_byte_level_tokenizer(tmp_path):
    own = byte_level(pad_token="</s>")
    own.chat_template = "{{ messages }}"
    found = written(tmp_path, own, rows=len(own) + 2)
    tokens, types = found.pop("ggml.tokens"), found.pop("ggml.token_type")
    assert tokens[:-2] == [own.convert_ids_to_tokens(i) for i in range(len(own))]
    assert tokens[-2:] == [f"[PAD{len(own)}]", f"[PAD{len(own) + 1}]"]
    assert types[:2] == [TokenType.CONTROL] * 2
    assert types[-4:] == [TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED]
    assert set(types[2:-3]) == {TokenType.NORMAL}
    merges = found.pop("ggml.merges")
    assert [tuple(m.split(" ")) for m in merges] == [tuple(m) for m in vocabulary._described(own)["model"]["merges"]]
    assert found == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 1,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": False,
        "chat_template": "{{ messages }}",
    }


def test_what_the_tokenizer_puts_around_a_text_is_said(tmp_path):
    own = byte_level()
    roles = [("<s>", 0), ("</s>", 1)]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=roles)
    found = written(tmp_path, own)
    assert found["ggml.add_bos_token"] is found["ggml.add_eos_token"] is True


def test_several_chat_templates_are_kept(tmp_path):
    own = byte_level()
    own.chat_template = {"default": "{{ a }}", "tools": "{{ b }}"}
    found = written(tmp_path, own)
    assert (found["chat_template"], found["chat_template.tools"]) == ("{{ a }}", "{{ b }}")


def test_spaces_within_a_merge_are_spelled_as_llama_cpp_reads_them(tmp_path):
    own = byte_level()
    spec = own.backend_tokenizer.model
    assert spec is not None
    tokens = {**own.get_vocab(), " ": 390, "a ": 391}
    made = Tokenizer(models.BPE(tokens, [("a", " ")]))
    made.pre_tokenizer, made.decoder = WORDS, decoders.ByteLevel()
    found = written(tmp_path, PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>"))
    assert found["ggml.merges"] == ["a Ġ"]


def test_a_vocabulary_of_bytes_alone_is_cut_by_any_name():
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    made.pre_tokenizer, made.decoder = BYTES, decoders.ByteLevel()
    assert vocabulary.notes(PreTrainedTokenizerFast(tokenizer_object=made)) == []


def test_tokenizers_of_other_kinds_are_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert "byte-level or sentencepiece BPE, not this WordLevel" in vocabulary.refuses(words)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    assert "not this Unigram" in vocabulary.refuses(unigram)
    assert "not this object" in vocabulary.refuses(object())
    assert vocabulary.refuses(None) is vocabulary.refuses(byte_level()) is vocabulary.refuses(sentencepiece()) is None
    assert Gguf().notes(type("Config", (), {})(), None) == []
