"""What loads where: the rules by which other software takes a checkpoint, or why it does not.

The rules are those of the versions named here; later ones may take more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantforge.exporters import words
from quantforge.exporters.compressed_tensors.schemes import FLOAT, INT, MXFP4, NVFP4, PACK, layout
from quantforge.models import moe
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.inputs import Inputs
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.verification.report import Loader

TRANSFORMERS, VLLM, PEFT = "5.23", "0.32", "0.21"
_GROUPS = (*sorted(words.GROUPS), -1)
_EXTRA = {
    "compressed-tensors": "compressed-tensors 0.15 to 0.17",
    "gptq": "optimum and gptqmodel",
    "awq": "gptqmodel and accelerate",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes8": "bitsandbytes",
    "gguf": "gguf and gguf_file=",
}
_ADAPTER = (
    "transformers, and PeftModel.from_pretrained(model, DIR/adapter) after a first forward, which unpacks the weights"
)
_OWN = "the container is quantforge's own; `quantforge convert` writes another one where that holds the same numbers"


@dataclass(frozen=True)
class Layer:
    """What loaders look at in one layer: its format, how its inputs are rounded, and NVFP4's global scale."""

    format: Format
    inputs: Inputs | None = None
    whole: float | None = None


def facts(weight: QWeight) -> Layer:
    """Return what loaders look at in a layer that was read."""
    scale, inputs = weight.base.scale, weight.inputs.inputs if weight.inputs else None
    whole = None
    if isinstance(scale, QTensor) and isinstance(scale.scale, torch.Tensor) and scale.scale.numel() == 1:
        whole = float(scale.scale.float())
    return Layer(weight.base.format, inputs, whole)


def judge(
    container: str, config: Mapping[str, Any], layers: Mapping[str, Layer], *, adapter: bool
) -> tuple[Loader, ...]:
    """Return who takes a sound checkpoint, and with what, or why not.

    config   its `quantization_config`
    layers   what loaders look at in each quantized layer
    adapter  whether a low-rank adapter lies beside it
    """
    beside = " and peft for its adapter" if adapter else ""
    if container == "native":
        stock = [Loader("transformers", TRANSFORMERS, _OWN), Loader("vLLM", VLLM, _OWN)]
    else:
        needs = _EXTRA[container] + beside + _dtype(layers)
        stock = [Loader("transformers", TRANSFORMERS, needs=needs), _vllm(container, config, layers, adapter)]
    gguf = "" if container == "gguf" else "it loads GGUF only; --format gguf"
    found = [*stock, Loader("llama.cpp", "", gguf)]
    if adapter:
        reason = _OWN if container == "native" else ""
        found.append(Loader("peft", PEFT, reason, _ADAPTER))
    return tuple(found)


def _dtype(layers: Mapping[str, Layer]) -> str:
    small = any(layout(x.format, x.inputs) in (MXFP4, NVFP4) for x in layers.values())
    return ", in bfloat16 only" if small else ""


def _vllm(container: str, config: Mapping[str, Any], layers: Mapping[str, Layer], adapter: bool) -> Loader:
    if container in ("bitsandbytes", "bitsandbytes8", "gguf"):
        what = "GGUF" if container == "gguf" else "bitsandbytes"
        return Loader("vLLM", VLLM, needs=f"its {what} plug-in")
    rules = {"compressed-tensors": _refuses_compressed, "gptq": _refuses_gptq, "awq": _refuses_awq}
    reason = rules[container](config, layers) or _refuses_parted(layers)
    needs = ["its --enable-lora for the adapter"] if adapter else []
    return Loader("vLLM", VLLM, reason, ", and ".join([*needs, *_kernels(layers.values())]))


def _kernels(layers: Collection[Layer]) -> list[str]:
    """Return what is needed that not every machine has: a GPU, and there the kernels of Humming."""
    gpu = any(_needs_gpu(layer) for layer in layers)
    if not any(map(_needs_humming, layers)):
        return ["a GPU"] if gpu else []
    return ["a GPU", "Humming's kernels"] if gpu else ["a CPU, or Humming's kernels on a GPU"]


def _needs_gpu(layer: Layer) -> bool:
    """Tell whether vLLM has no kernel for a layer on CPUs, where it has 4 bits, W8A8 and FP8 with rounded inputs."""
    kind, inputs = layout(layer.format, layer.inputs), layer.inputs
    return (
        kind in (MXFP4, NVFP4)
        or (kind == PACK and (layer.format.grid.bits != 4 or inputs is not None))
        or (kind == FLOAT and inputs is None)
    )


def _needs_humming(layer: Layer) -> bool:
    """Tell whether on a GPU only Humming, a package of its own, has a kernel for a layer."""
    fmt = layer.format
    if layout(fmt, layer.inputs) != PACK:
        return False
    assert isinstance(fmt.block, tuple)
    return layer.inputs is not None or fmt.grid.bits not in (4, 8) or (fmt.block[1] or -1) not in _GROUPS


def _refuses_compressed(config: Mapping[str, Any], layers: Mapping[str, Layer]) -> str:
    """Return why vLLM does not take a compressed-tensors checkpoint; empty if it does."""
    cache = config.get("kv_cache_scheme")
    if isinstance(cache, Mapping) and (cache.get("type"), cache.get("num_bits")) != ("float", 8):
        return "it rounds keys and values to FP8 only"
    for group in config["config_groups"].values():
        if (group.get("weights") or {}).get("actorder") in ("group", "dynamic", True):
            return "it refuses inputs ordered by group (actorder); static order works"
    for name, layer in layers.items():
        reason = _refuses_scheme(layer)
        if reason:
            return f"{name}: {reason}"
    return ""


def _refuses_scheme(layer: Layer) -> str:
    """Return why vLLM has no scheme for what compressed-tensors says of one layer."""
    kind, inputs = layout(layer.format, layer.inputs), layer.inputs
    if inputs is None:
        return "" if kind is not None else f"it knows no {layer.format}"
    by_token, by_tensor = inputs.format.block == (1, None), inputs.format.block == (None, None)
    known = (by_token and not inputs.static) or (by_tensor and inputs.static)
    if kind == FLOAT and layer.format.block == (128, 128):
        known = inputs.format.block == (1, 128) and not inputs.static
    if kind == INT:
        known = known and layer.format.block in ((1, None), (None, None))
    if kind == PACK:
        known = by_token and not inputs.static and layer.format.symmetric and layer.format.grid.bits == 4
        known = known and isinstance(inputs.format.grid, IntGrid) and inputs.format.symmetric
    return "" if known else f"it computes otherwise with {layer.format} x {inputs}; int8-token inputs work"


def _refuses_gptq(config: Mapping[str, Any], layers: Mapping[str, Layer]) -> str:
    if config.get("bits") not in (4, 8) or config.get("sym") is not True:
        return (
            f"it takes GPTQ of 4 and 8 bits without zero points, not bits {config.get('bits')}, sym {config.get('sym')}"
        )
    if config.get("desc_act") and config.get("group_size") != -1:
        return "it takes GPTQ without desc_act only"
    return _refuses_group(config)


def _refuses_awq(config: Mapping[str, Any], layers: Mapping[str, Layer]) -> str:
    if config.get("bits") != 4:
        return f"it takes AWQ of 4 bits only, not {config.get('bits')}"
    return _refuses_group(config)


def _refuses_group(config: Mapping[str, Any]) -> str:
    size = config.get("group_size")
    return "" if size in _GROUPS else f"it has kernels for groups of {', '.join(map(str, _GROUPS))}, not {size}"


def _refuses_parted(layers: Mapping[str, Layer]) -> str:
    """Return which layers vLLM would read as one and cannot, as they are stored differently; empty if none."""
    for name in layers:
        parent, _, own = name.rpartition(".")
        partners = next((names for names in words.FUSED if own == names[0]), ())
        if moe.expert_of(name):
            continue
        found = {f"{parent}.{partner}": layers.get(f"{parent}.{partner}") for partner in partners}
        for other, layer in found.items():
            first = layers[name]
            if layer is None or (layer.format, layer.inputs, layer.whole) != (first.format, first.inputs, first.whole):
                return f"it reads {name} and {other.rpartition('.')[2]} as one layer, and they are stored differently"
    return ""
