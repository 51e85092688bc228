"""Low-rank corrections as a PEFT adapter beside the checkpoint: `PeftModel.from_pretrained(model, DIR/adapter)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantforge.errors import ModelError
from quantforge.models.folder import MAX_CONFIG, contained
from quantforge.models.headers import read_header, read_json, show
from quantforge.numerics.residuals import LowRank
from quantforge.store import write_tensors, write_text

FOLDER = "adapter"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write(folder: Path, factors: Mapping[str, LowRank], base: str) -> None:
    """Write the factors of each layer, by full name, as an adapter that adds A B to that layer.

    base  what the adapter's config says it belongs to
    """
    ranks = {name: int(f.factors()[0].shape[1]) for name, f in factors.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # the product is scaled by alpha / r
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: r for name, r in ranks.items() if r != rank},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(factors),
    }
    tensors = {}
    for name, low_rank in factors.items():
        a, b = low_rank.factors()
        tensors[f"{_PREFIX}{name}{_A}"] = b.contiguous().cpu()
        tensors[f"{_PREFIX}{name}{_B}"] = a.contiguous().cpu()
    write_text(folder / _FILES[0], json.dumps(config, indent=1) + "\n")
    write_tensors(folder / _FILES[1], tensors, {"format": "pt"})


def read(folder: Path) -> dict[str, LowRank]:
    """Return the factors of each layer, by full name; ModelError for what `write` did not make.

    `folder` lies in a checkpoint, which no link may leave. Only a product that is added as it is, unscaled, is read.
    """
    _check_config(folder, read_json(_inside(folder, _FILES[0]), MAX_CONFIG))
    file = _inside(folder, _FILES[1])
    read_header(file)  # which checks it more strictly than its reader does
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(376, f"{file} cannot be read ({error}).") from error
    found = {}
    names = {key.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B) for key in tensors}
    for name in sorted(names):
        b, a = (tensors.pop(f"{_PREFIX}{name}{part}", torch.empty(0)) for part in (_A, _B))
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
            raise ModelError(377, f"{folder}: the factors of {show(name)} do not fit together; the adapter is damaged.")
        if not all(x.dtype in _DTYPES and x.isfinite().all() for x in (a, b)):
            raise ModelError(
                377, f"{folder}: the factors of {show(name)} are no finite floats; the adapter is damaged."
            )
        found[name] = LowRank(a, b)
    return found


def _inside(folder: Path, name: str) -> Path:
    return contained(folder.parent, f"{folder.name}/{name}", Path(name).suffix)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise ModelError unless every product is added unscaled: alpha equals the rank, and no variant of LoRA is on."""
    one = "r" in config and config.get("lora_alpha") == config["r"]
    each = (config.get("alpha_pattern") or {}) == (config.get("rank_pattern") or {})
    if not one or not each or config.get("use_rslora") or config.get("use_dora"):
        raise ModelError(
            378,
            f"{folder / _FILES[0]} scales the factors (lora_alpha must equal r); it was changed after it was saved.",
        )
