"""Low-rank corrections as a PEFT adapter beside the checkpoint: `PeftModel.from_pretrained(model, DIR/adapter)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quantforge.errors import ModelError
from quantforge.numerics.residuals import LowRank

FOLDER = "adapter"
_PREFIX = "base_model.model."
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
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = b.contiguous().cpu()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = a.contiguous().cpu()
    folder.mkdir()
    (folder / _FILES[0]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / _FILES[1], metadata={"format": "pt"})


def read(folder: Path) -> dict[str, LowRank]:
    """Return the factors of each layer, by full name; ModelError for what `write` did not make."""
    try:
        tensors = load_file(folder / _FILES[1])
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(376, f"{folder / _FILES[1]} cannot be read ({error}).") from error
    found = {}
    for key, b in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        a = tensors.get(key.replace(".lora_A.", ".lora_B."), torch.empty(0))
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
            raise ModelError(377, f"{folder}: the factors of {name} do not fit together; the adapter is damaged.")
        found[name] = LowRank(a, b)
    return found
