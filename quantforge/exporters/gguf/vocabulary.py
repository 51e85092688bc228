"""A tokenizer as the metadata of a GGUF file, from which llama.cpp tokenizes by code of its own.

Two kinds are known: byte-level BPE ("gpt2"), for which the file names one of the ways to cut text into words that
llama.cpp knows, and BPE over characters with bytes to fall back on ("llama"), as sentencepiece makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import gguf
from gguf import TokenType

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}"
_BYTES, _WORDS = ("ByteLevel", False), ("ByteLevel", True)
# (steps, whether a word that is a token is taken whole) → what llama.cpp calls it
_KNOWN = {
    ((_WORDS,), False): "gpt-2",
    ((("Digits", True), _WORDS), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "dbrx",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
}
UNKNOWN = "default"
_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def refuses(tokenizer: Any) -> str | None:
    """Return why a tokenizer cannot be written as GGUF, and what could; None if it can, or if there is none."""
    if tokenizer is None or _kind(_described(tokenizer)) is not None:
        return None
    kind = _described(tokenizer).get("model", {}).get("type") or type(tokenizer).__name__
    return (
        f"GGUF holds tokenizers that are byte-level or sentencepiece BPE, not this {kind}; native can hold the model."
    )


def notes(tokenizer: Any) -> list[str]:
    """Return what a user should know of a tokenizer that is written as GGUF."""
    spec = {} if tokenizer is None else _described(tokenizer)
    if _kind(spec) == "gpt2" and pretokenizer(spec) == UNKNOWN:
        return [
            "llama.cpp has no name for how this tokenizer cuts text into words, and will cut by its default; other "
            "tokens may come out there"
        ]
    return []


def write(writer: gguf.GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Write all that llama.cpp needs to tokenize as `tokenizer`, which `refuses` did not refuse; None: no vocabulary.

    rows  of the embedding; what the vocabulary lacks of them is filled up with tokens that no text yields
    """
    if tokenizer is None:
        writer.add_tokenizer_model(gguf.NoVocab.tokenizer_model)
        return
    spec = _described(tokenizer)
    kind = _kind(spec)
    assert kind is not None
    tokens, types = _tokens(spec, kind, rows)
    merges = [_pair(merge) for merge in spec["model"]["merges"]]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pretokenizer(spec) if kind == "gpt2" else UNKNOWN)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores(_scores(tokens, merges))
    else:
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges])
    for role in _ROLES:
        found = getattr(tokenizer, f"{role}_token_id", None)
        if found is not None and found < rows:
            getattr(writer, f"add_{role}_token_id")(found)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(kind == "llama" and _prefixed(spec))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def pretokenizer(spec: Mapping[str, Any]) -> str:
    """Return what llama.cpp calls the way in which a byte-level tokenizer cuts text into words, or `UNKNOWN`."""
    if not spec["model"]["merges"]:
        return _KNOWN[(_WORDS,), False]  # where nothing is merged, it does not matter how text is cut
    parts = spec.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    steps = tuple(_step(part) for part in parts)
    return _KNOWN.get((steps, bool(spec["model"].get("ignore_merges"))), UNKNOWN)


def _step(part: Mapping[str, Any]) -> tuple[str, Any]:
    """Return what one step does, in as much as it is known."""
    kind = str(part.get("type"))
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return kind, bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part.get("individual_digits"))
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return kind, part.get("pattern", {}).get("Regex")
    return kind, None


def _described(tokenizer: Any) -> dict[str, Any]:
    """Return what tokenizer.json says; empty where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return {}
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def _kind(spec: Mapping[str, Any]) -> str | None:
    """Return which kind of tokenizer it is to llama.cpp, or None."""
    model = spec.get("model", {})
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if model.get("byte_fallback"):
        return "llama"
    return "gpt2" if (spec.get("decoder") or {}).get("type") == "ByteLevel" else None


def _tokens(spec: Mapping[str, Any], kind: str, rows: int) -> tuple[list[str], list[TokenType]]:
    """Return text and type of each of `rows` tokens."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [TokenType.UNUSED] * rows
    unknown = spec["model"].get("unk_token")
    for token, i in spec["model"]["vocab"].items():
        if i < rows:
            tokens[i], types[i] = token, TokenType.NORMAL
            if kind == "llama" and _BYTE.fullmatch(token):
                types[i] = TokenType.BYTE
            elif kind == "llama" and token == unknown:
                types[i] = TokenType.UNKNOWN
    for added in spec.get("added_tokens", []):
        i = added["id"]
        if i < rows and types[i] != TokenType.UNKNOWN:
            tokens[i] = added["content"]
            types[i] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, types


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Return scores by which the merge of the highest is the first of `merges`, as sentencepiece's are ordered."""
    first = {left + right: -float(i) for i, (left, right) in reversed(list(enumerate(merges)))}
    return [first.get(token, -float(len(merges))) for token in tokens]


def _prefixed(spec: Mapping[str, Any]) -> bool:
    """Tell whether a space is put before the text."""
    steps: list[Mapping[str, Any]] = []
    for part, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        found = spec.get(part) or {}
        steps += found.get(inner, [found])
    return any(s.get("type") == "Prepend" or s.get("prepend_scheme", "never") != "never" for s in steps)
