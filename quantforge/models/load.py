"""A folder, a hub id or the demo model → a checked model and its tokenizer."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from quantforge.errors import ModelError, ResourceError, clean
from quantforge.models import check, demo, moe
from quantforge.network import reachable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# float64 checkpoints are computed and saved in float32: no format stores wider scales
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}


@dataclass(frozen=True)
class Source:
    """A model that was found and checked, with nothing of its weights read yet.

    name      what reports call it
    path      the folder, or the folder of the demo model's file
    config    the transformers config, without keys that run code
    dtype     the dtype of its checkpoint, in which scales will be stored
    gguf      the file's name for the demo model, else None
    notes     what the user should know
    lattice   (bits, block size) where the weights were dequantized from such a file, else None
    """

    name: str
    path: Path
    config: Any
    dtype: torch.dtype
    gguf: str | None = None
    notes: tuple[str, ...] = ()
    lattice: tuple[int, int] | None = None
    folder: check.Folder | None = None
    trust_remote_code: bool = False

    def digest(self) -> str:
        """Return a digest of the model's files, and of the code that was allowed to run."""
        files = {self.path / self.gguf} if self.gguf else {self.path / "config.json"}
        if self.folder is not None:
            files |= {tensor.file for tensor in self.folder.tensors.values()}
        if self.trust_remote_code:
            files |= set(self.path.rglob("*.py"))
        return fingerprint(files, str(self.trust_remote_code))

    def fingerprint(self, device: str) -> str:
        """Return a digest of the files, and of the versions and the kind of device that compute with them."""
        return fingerprint((), self.digest(), torch.__version__, transformers.__version__, device)

    def skeleton(self) -> nn.Module:
        """Return the model on the meta device: every layer and shape, no weights; checked against the files.

        Experts are layers of their own.
        """
        kind = getattr(self.config, "model_type", None)
        with check.as_refusal(self.path, kind), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, trust_remote_code=self.trust_remote_code
            )
        if self.folder is not None:
            check.check_names_and_shapes(self.folder, model)
        moe.unfuse(model)
        return model


def fingerprint(files: Iterable[Path], *facts: str) -> str:
    """Return the SHA-256 of the files' contents and names, and of facts such as versions and the device."""
    found = sha256("\0".join(facts).encode())
    for path in sorted(files):
        found.update(b"\0" + path.name.encode("utf-8", "surrogateescape") + b"\0")
        with path.open("rb") as file:
            while part := file.read(2**22):
                found.update(part)
    return found.hexdigest()


def find(model: str | None, *, trust_remote_code: bool = False) -> Source:
    """Find a model by folder, by hub id, or (None) the demo model; check config, index and headers.

    Raises ModelError for anything damaged or missing, ResourceError when a hub id cannot be reached.
    """
    if model is None:
        file = demo.find()
        with quiet():
            settings = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(key, None)
        config = make_config(file.parent, {**settings, "dtype": "bfloat16"})
        return Source(demo.NAME, file.parent, config, torch.bfloat16, file.name, (demo.NOTE,), demo.LATTICE)
    path = Path(model)
    local = os.path.exists(path)  # False, not an error, for a name that no file could have
    if not local:
        path = _download(model, trust_remote_code)
    folder = check.read_folder(path, trust_remote_code=trust_remote_code)
    notes = (f"keys of config.json were ignored: {', '.join(folder.stripped)}",) if folder.stripped else ()
    return Source(
        clean(path.resolve().name if local else model),
        path,
        make_config(path, folder.config, trust_remote_code=trust_remote_code),
        DTYPES[folder.dtype],
        notes=notes,
        folder=folder,
        trust_remote_code=trust_remote_code,
    )


def make_config(folder: Path, settings: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Turn the keys of a checked config.json into a transformers config; ModelError if transformers refuses them."""
    settings = dict(settings)
    kind = settings.pop("model_type", None)
    try:
        if trust_remote_code and "auto_map" in settings:
            return AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:  # a hostile config can make transformers raise anything
        raise ModelError(361, f"{folder / 'config.json'}: {kind} does not accept it: {error}") from error


def _download(name: str, trusted: bool) -> Path:
    """Fetch a hub model's config, tokenizer, safetensors and, if trusted, code; offline, use what the cache has."""
    allowed = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", *(["*.py"] if trusted else [])]
    offline = bool(constants.HF_HUB_OFFLINE) or not reachable()
    try:
        return Path(snapshot_download(name, allow_patterns=allowed, local_files_only=offline))
    except Exception as error:
        raise ModelError(
            362,
            f"{name!r} is no folder here and could not be fetched from the hub ({type(error).__name__}); "
            "give a local folder, or leave MODEL out for the demo model.",
        ) from error


def tokenizer(source: Source) -> Any:
    """Return the model's tokenizer; ModelError if it is missing or does not fit the embedding."""
    found = read_tokenizer(source.path, gguf=source.gguf, trust_remote_code=source.trust_remote_code)
    check.check_tokenizer(found, source.config, source.name)
    return found


def read_tokenizer(folder: Path, *, gguf: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in `folder`, or of its GGUF file; ModelError if it cannot be loaded."""
    where = {"gguf_file": gguf} if gguf else {}
    if not gguf and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers makes one up for some architectures, with no words in it
        raise ModelError(363, f"{folder} has no tokenizer: {', '.join(TOKENIZER_FILES)} are all missing.")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=trust_remote_code,  # None would ask the user
                **where,
            )
    except Exception as error:
        raise ModelError(363, f"{folder}: its tokenizer cannot be loaded ({error}).") from error


def model(source: Source, device: str = "cpu") -> nn.Module:
    """Return the model in float32 on `device`, in evaluation mode; NaN or infinity in it is a ModelError.

    Weights keep the values of the checkpoint's dtype: float32 is what is computed in. Experts are layers of their own.
    """
    with quiet():
        if source.gguf:
            loaded = _dequantized(source)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                source.path,
                config=source.config,
                dtype=source.dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=source.trust_remote_code,
            )
    try:
        check.check_finite(loaded)
    except ModelError:  # of what was read, or of what became of it in the model's dtype?
        if source.folder is not None:
            check.check_tensors(read_tensors(source.folder).items(), source.dtype)
        raise
    moe.unfuse(loaded)
    result: nn.Module = loaded.float().eval().to(check_device(device))
    return result


def _dequantized(source: Source) -> Any:
    """Read the GGUF file through transformers, and put its weights into an ordinary model in the source's dtype."""
    with contextlib.redirect_stderr(io.StringIO()):  # the reader draws a bar that nothing else turns off
        read = AutoModelForCausalLM.from_pretrained(source.path, gguf_file=source.gguf, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(source.config, dtype=source.dtype)
    model.load_state_dict(read.state_dict())
    return model


def check_device(device: str) -> torch.device:
    """Return the device called "cpu" or "cuda"; ResourceError if the machine lacks it."""
    if device not in ("cpu", "cuda"):
        raise ResourceError(501, f"there is no device {device!r}; cpu and cuda are known.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(502, "--device cuda was asked for, but torch sees no CUDA GPU; --device cpu works.")
    return torch.device(device)


def read_tensors(folder: check.Folder) -> dict[str, torch.Tensor]:
    """Return every tensor of a checked folder, by name, as stored."""
    tensors = {}
    for file in sorted({t.file for t in folder.tensors.values()}):
        tensors.update(load_file(file))
    return tensors


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and the GGUF reader's own progress bars and notices while loading."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
