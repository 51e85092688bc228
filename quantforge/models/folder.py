"""Read a model folder completely before anything expensive: config.json, the index and every safetensors header.

Nothing outside the folder is opened, nothing in it is run, and what may choose code is taken out of the config.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from quantforge.errors import ModelError, nearest
from quantforge.models.beside import check_beside, check_tokenizer_class
from quantforge.models.headers import (
    MAX_HEADER,
    TensorInfo,
    damaged,
    file_size,
    open_error,
    read_header,
    read_json,
    show,
    some,
)

MAX_CONFIG = 1_000_000
MAX_DEPTH = 32
FLOATS = ("BF16", "F16", "F32", "F64")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # transformers loads what it names with the model, if peft is installed
# Keys that choose code by name, which transformers may fetch from the hub, that claim the user's consent, or that
# rename the config's own attributes.
_HOSTILE = re.compile(
    r"_?(attn|experts)_implementation.*|trust_remote_code|kernel_config|fusion_config|transformers_weights|_auto_class|attribute_map|__.*"
)
# what a forward gives back, which only the caller may choose: more than is asked for is kept for every block
_RETURNED = {"output_attentions": False, "output_hidden_states": False, "return_dict": True, "torchscript": False}
_COUNT = re.compile(r"((num|n|encoder|decoder)_)(\w+_)?(layers?|blocks|experts|labels|codebooks|quantizers)")
MANY = 4096  # modules of a kind that a config may ask for, and more only if the files hold as many tensors


@dataclass(frozen=True)
class Folder:
    """A model folder whose files have been checked.

    config    config.json without the keys that choose code
    tensors   every tensor of every weight file, by name
    stripped  the keys removed from config.json, dotted, for a note to the user
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stripped: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors together."""
        return sum(t.stop - t.start for t in self.tensors.values())

    @property
    def dtype(self) -> str:
        """Return the float dtype that holds most bytes: "BF16", "F16", "F32" or "F64"."""
        held = Counter(dict.fromkeys(FLOATS, 0))
        for t in self.tensors.values():
            if t.dtype in FLOATS:
                held[t.dtype] += t.stop - t.start
        return held.most_common(1)[0][0]


def read_folder(path: Path, *, trust_remote_code: bool = False, quantized: bool = False) -> Folder:
    """Read config.json, the index and all headers of a local model folder; ModelError for whatever is wrong with them.

    trust_remote_code  accept a config.json whose auto_map names code of its own; nothing is run here either way
    quantized          accept, and keep, a top-level quantization_config
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise ModelError(310, f"there is no folder {show(path)}: download the model first and name its folder.")
    if os.path.lexists(path / ADAPTER):
        raise ModelError(
            323,
            f"{show(path)} holds {ADAPTER}, and an adapter changes the weights when the model is loaded: merge the "
            "adapter first, or delete that file if the model is to be used without it.",
        )
    config, stripped = read_config(path, trust_remote_code, quantized)
    tensors = _tensors(path)
    _check_counts(config, max(MANY, len(tensors)), "")
    if not any(t.dtype in FLOATS for t in tensors.values()):
        raise ModelError(
            315,
            f"the weight files in {show(path)} hold no tensor of {', '.join(FLOATS)}: download an unquantized model.",
        )
    return Folder(path, config, tensors, stripped)


def read_config(path: Path, trusted: bool, quantized: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what config.json says, without what loading may not be told, and the names of what was left out.

    quantized  whether it may have a `quantization_config`
    """
    if not os.path.lexists(path / "config.json"):
        raise ModelError(
            310, f"config.json is missing in {show(path)}: name the folder that has it, or download it again."
        )
    stripped: list[str] = []
    raw = read_json(contained(path, "config.json", ".json"), MAX_CONFIG)
    kept = {"quantization_config": raw.pop("quantization_config")} if quantized and "quantization_config" in raw else {}
    config = _clean(raw, "", 1, stripped, trusted) | kept
    check_tokenizer_class("config.json", config.get("tokenizer_class"))
    check_beside(path, contained)
    kind = config.get("model_type")
    custom = trusted and "auto_map" in config
    if not custom and (not isinstance(kind, str) or not kind):
        raise ModelError(311, f"config.json has no model_type ({show(kind)}): add it, such as 'llama'.")
    if not custom and kind not in CONFIG_MAPPING:
        near = nearest(str(kind)[:80], CONFIG_MAPPING.keys())
        raise ModelError(
            311, f"config.json has the unknown model_type {show(kind)}: {near or 'upgrading transformers may help.'}"
        )
    return config, tuple(stripped)


def _clean(config: dict[str, Any], where: str, depth: int, stripped: list[str], trusted: bool) -> dict[str, Any]:
    """Return `config` without hostile keys at any depth, added to `stripped`; refuse code and quantized models."""
    if depth > MAX_DEPTH:
        raise damaged(306, f"config.json is nested more than {MAX_DEPTH} deep at {show(where)}")
    kept: dict[str, Any] = {}
    for key, value in config.items():
        shadows = callable(getattr(PreTrainedConfig, key, None))
        if shadows or _HOSTILE.fullmatch(key) or (key in _RETURNED and value != _RETURNED[key]):
            stripped.append(where + key)
            continue
        if key in ("auto_map", "custom_pipelines") and value and not trusted:
            raise ModelError(
                312,
                f"config.json has {show(where + key)}: the model wants to run its own code. Pass --trust-remote-code "
                f"if you have read and trust it, or delete {key} from config.json to use transformers' own code.",
            )
        if key in ("quantization_config", "compression_config") and value is not None:
            method = value.get("quant_method", value.get("quant_algo")) if isinstance(value, dict) else value
            named = show(method) if method else "an unnamed method"
            raise ModelError(
                313,
                f"the model is already quantized with {named} ({show(where + key)} in config.json): use the original.",
            )
        kept[key] = _clean_value(value, f"{where}{key}.", depth + 1, stripped, trusted)
    return kept


def _clean_value(value: Any, where: str, depth: int, stripped: list[str], trusted: bool) -> Any:
    if isinstance(value, dict):
        return _clean(value, where, depth, stripped, trusted)
    if isinstance(value, list):
        if depth > MAX_DEPTH:
            raise damaged(306, f"config.json is nested more than {MAX_DEPTH} deep at {show(where)}")
        return [_clean_value(item, where, depth + 1, stripped, trusted) for item in value]
    return value


def _check_counts(config: dict[str, Any], most: int, where: str) -> None:
    """Refuse a config of more layers than there are tensors: making them would take hours before anything is missed."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, most, f"{where}{key}.")
        elif isinstance(value, int | float) and value > most and _COUNT.fullmatch(key):
            raise ModelError(
                327,
                f"config.json says {where}{key} is {value:,}, more than the {most:,} that its weight files could hold: "
                "use the config.json of this model.",
            )


def contained(path: Path, name: str, suffix: str) -> Path:
    """Return the file called `name` if it cannot lie outside the folder on any system; ModelError otherwise.

    A link may lead elsewhere in the folder or, from a snapshot in the hub's cache, into that cache's blobs.
    """
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    bad = windows.drive or windows.root or posix.root or ".." in windows.parts or "\\" in name or not name.isprintable()
    if bad or not posix.name:
        raise ModelError(
            316, f"the file {show(name)} is not a plain name inside {show(path)}: do not trust this model."
        )
    if posix.suffix != suffix:
        raise ModelError(316, f"the file {show(name)} does not end in {suffix}: no other kind is read.")
    root, target = Path(os.path.realpath(path)), Path(os.path.realpath(path / name))
    if not target.is_relative_to(root) and not _in_hub_cache(root, target):
        raise ModelError(316, f"{show(name)} is a link that leads out of {show(path)}: put the file itself there.")
    return path / name


def _in_hub_cache(root: Path, target: Path) -> bool:
    """Tell whether `root` is <cache>/<repo>/snapshots/<rev> and `target` a blob of that repo or of the cache."""
    if root.parent.name != "snapshots":
        return False
    repo = root.parent.parent
    if target.parent == repo / "blobs":
        return True
    store = repo.parent / "blobs"
    shared = re.fullmatch(r"[0-9a-f]{64}", target.name) and target.parent == store / target.name[:2]
    return bool(shared) and repo.name.startswith("models--")


def _tensors(path: Path) -> dict[str, TensorInfo]:
    if not os.path.lexists(path / INDEX):
        if not os.path.lexists(path / SINGLE):
            raise _no_weights(path)
        return read_header(contained(path, SINGLE, ".safetensors"))
    weight_map = read_json(contained(path, INDEX, ".json"), MAX_HEADER).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise damaged(317, f"{INDEX} has no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    if names != [SINGLE] and os.path.lexists(path / SINGLE):  # which transformers would load alone
        raise ModelError(
            318,
            f"{show(path)} has both {SINGLE} and {INDEX}: delete {SINGLE} if the {len(names)} shards are the model, "
            f"or {INDEX} if the single file is.",
        )
    files = {name: contained(path, name, ".safetensors") for name in names}
    missing = [show(name) for name, file in files.items() if not os.path.exists(file)]
    if missing:
        raise ModelError(
            319, f"{len(missing)} of {len(names)} shards are missing in {show(path)}: {some(missing)}; download them."
        )
    for file in files.values():
        file_size(file)
    return _joined(weight_map, {name: read_header(file) for name, file in files.items()})


def _joined(weight_map: dict[str, str], shards: dict[str, dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Join the headers of all shards, which must hold exactly what the index says."""
    lacking = [f"{show(t)} in {show(s)}" for t, s in weight_map.items() if t not in shards[s]]
    if lacking:
        raise damaged(320, f"{INDEX} names {len(lacking)} tensors that their shards lack: {some(lacking)}")
    extra = [f"{show(t)} in {show(s)}" for s, header in shards.items() for t in header if weight_map.get(t) != s]
    if extra:
        raise damaged(320, f"the shards hold {len(extra)} tensors that {INDEX} does not place there: {some(extra)}")
    return {name: info for header in shards.values() for name, info in header.items()}


def _no_weights(path: Path) -> ModelError:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise open_error(path, error) from error
    others = [name for name in names if name.endswith(".safetensors")]
    if "adapter_model.safetensors" in others:
        return ModelError(321, f"{show(path)} holds an adapter, not a model: merge it into its base model first.")
    if others:
        return ModelError(321, f"{show(path)} has {some(map(show, others), 3)} but no {INDEX}: download that file too.")
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        return ModelError(321, f"{show(path)} has no weights: download {SINGLE}, or {INDEX} and its shards.")
    # The pattern, never the files' own names: those could smuggle code into a line made for pasting.
    usual = next((name for name in pickles if name.startswith("pytorch_model")), None)
    pattern = f"{'pytorch_model' if usual else ''}*{Path(usual or pickles[0]).suffix}"
    return ModelError(
        322,
        f"{show(path)} has only pickled weights ({some(map(show, pickles), 3)}), which can run code. "
        f"Convert them in that folder, on a machine you trust with it: "
        f'python -c "import glob, torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.contiguous().clone() for f in sorted(glob.glob('{pattern}')) for k, v in "
        f"torch.load(f, weights_only=True).items()}}, '{SINGLE}', {{'format': 'pt'}})\"",
    )
