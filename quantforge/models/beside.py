"""The files beside config and weights that transformers opens by itself when it loads a model or its tokenizer.

transformers follows their links, reads them whatever their size, and takes from them the name of a class to make.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantforge.errors import ModelError
from quantforge.models.headers import file_size, open_error, read_json, show

MAX_FILE = 2**29  # of a vocabulary or a template; the largest in use have some 35 MB
MAX_JSON = 2**25
GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
_OBJECTS = (GENERATION, TOKENIZER, "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_TEMPLATES = "additional_chat_templates"
# what the tokenizers of transformers look for: by name, and, for a vocabulary of SentencePiece, by how it ends
_NAMES = re.compile(
    r"(tokenizer.*|tekken|vocab.*|merges|spiece|special_tokens_map|added_tokens|chat_template|preprocessor_config"
    r"|processor_config|generation_config|normalizer)\.(json|txt|model|jinja)|.*\.model|.*\.tiktoken"
)
_CLASS = re.compile(r"[A-Za-z0-9_]+(Tokenizer|TokenizerFast|Backend)")
_PLAIN = re.compile(r"[\w.-]+\.json")
# arguments of transformers' tokenizers that are opened where they are text, from wherever they point to
_OPENED = re.compile(r"(.*_)?(file|files|path|dir|spm|model|vocab|merges|emoji|option)")
_TOLD_ONLY = ("fast_tokenizer_files", "name_or_path", "special_tokens_map_file", "_name_or_path")  # or checked above


def check_beside(path: Path, contained: Callable[[Path, str, str], Path]) -> None:
    """Refuse files that transformers would open though they are links out of the folder, no files, huge or damaged.

    path       a model folder
    contained  finds a file of it by name and suffix, refusing one that leads out of the folder
    Raises ModelError. No file but small JSON is read, and nothing that they name is opened.
    """
    for name in sorted(names(path)):
        file = contained(path, name, Path(name).suffix)
        if name in _OBJECTS:
            found = read_json(file, MAX_JSON)
            if name == TOKENIZER:
                _check_tokenizer_config(found)
        elif file_size(file) > MAX_FILE:
            raise ModelError(324, f"{show(name)} has more than {MAX_FILE:,} bytes: no tokenizer needs so many.")


def check_tokenizer_class(where: str, name: object) -> None:
    """Raise ModelError if `name`, which `where` calls its tokenizer_class, can be anything else of transformers'."""
    if name is not None and not (isinstance(name, str) and _CLASS.fullmatch(name)):
        raise ModelError(325, f"{where} asks for the tokenizer_class {show(name)}, which is no tokenizer: remove it.")


def names(path: Path) -> list[str]:
    """Return the names of the files that transformers may open, of extra templates with their folder."""
    try:
        names = [entry for entry in os.listdir(path) if _NAMES.fullmatch(entry)]
        if os.path.isdir(path / _TEMPLATES):
            names += [f"{_TEMPLATES}/{entry}" for entry in os.listdir(path / _TEMPLATES) if entry.endswith(".jinja")]
    except OSError as error:
        raise open_error(path, error) from error
    return names


def _check_tokenizer_config(found: dict[str, Any]) -> None:
    check_tokenizer_class(TOKENIZER, found.get("tokenizer_class"))
    files = found.get("fast_tokenizer_files", [])
    if not isinstance(files, list) or not all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in files):
        raise ModelError(
            326, f"{TOKENIZER} has fast_tokenizer_files {show(files)}, which are no plain names: remove it."
        )
    for key, value in found.items():
        if key in ("tokenizer_object", "init_inputs") and value not in (None, []):
            raise ModelError(326, f"{TOKENIZER} has {key} {show(value)}, which stands for arguments: remove it.")
        parts = value.items() if key.endswith("_kwargs") and isinstance(value, dict) else [(key, value)]
        for name, part in parts:
            if isinstance(part, str) and _OPENED.fullmatch(name) and name not in _TOLD_ONLY:
                raise ModelError(326, f"{TOKENIZER} has {name} {show(part)}, a file that would be opened: remove it.")
