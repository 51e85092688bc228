"""Architectures, a row each: where the decoder blocks are, and which linear layers of a block read the same input."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantforge.errors import ModelError
from quantforge.models import moe
from quantforge.models.walk import Stage

_DRY_TOKENS = 16  # of the forward that shows in which order layers are called


@dataclass(frozen=True)
class Arch:
    """One row of the table.

    blocks   where the list of decoder blocks is, from the model's top
    stages   the linear layers of one block in the order in which they run; those of one tuple read the same input
    experts  the same of one expert, in blocks that have experts instead of an MLP; the router stays in float
    """

    blocks: str
    stages: tuple[tuple[str, ...], ...]
    experts: tuple[tuple[str, ...], ...] = ()

    def of_block(self, block: nn.Module) -> list[tuple[str, ...]]:
        """Return the stages of `block`, by names within it."""
        experts = getattr(getattr(block, "mlp", None), "experts", None)
        if not isinstance(experts, moe.Experts):
            return list(self.stages)
        each = [f"{moe.EXPERTS}.{index}" for index in range(len(experts))]
        return [
            *(stage for stage in self.stages if not stage[0].startswith("mlp.")),
            *(tuple(f"{expert}.{name}" for name in stage) for expert in each for stage in self.experts),
        ]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = (_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

TABLE = {
    "llama": Arch("model.layers", _GATED),
    "mistral": Arch("model.layers", _GATED),
    "qwen2": Arch("model.layers", _GATED),
    "qwen3": Arch("model.layers", _GATED),
    "gemma2": Arch("model.layers", _GATED),
    "gemma3_text": Arch("model.layers", _GATED),
    "gemma3": Arch("model.language_model.layers", _GATED),
    "opt": Arch("model.decoder.layers", (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",))),
    "gpt2": Arch("transformer.h", (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))),
    "phi3": Arch(
        "model.layers", (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
    ),
    "mixtral": Arch("model.layers", _GATED[:2], moe.NAMES["mixtral"]),
    "qwen3_moe": Arch("model.layers", _GATED, moe.NAMES["qwen3_moe"]),  # some blocks may have an MLP
}


def knows(model: nn.Module) -> bool:
    """Tell whether the architecture of `model` has a row in the table."""
    return getattr(model.config, "model_type", "") in TABLE


def find_stages(model: nn.Module) -> tuple[list[Stage], str]:
    """Return the stages of every block of `model`, in the order of its forward, and a note ("" when there is none).

    An architecture that the table lacks is walked: every linear layer of its decoder blocks is a stage of its own, in
    the order in which a short forward calls them (on the meta device, where nothing can run: of definition), and the
    note says so, and which experts it could not take. The table's fused experts are taken apart first (`moe.unfuse`),
    so that each of their layers is one. ModelError if no decoder blocks are found.
    """
    moe.unfuse(model)
    kind = getattr(model.config, "model_type", "")
    arch = TABLE.get(kind)
    stages: list[Stage] = []
    if arch is not None:
        for i, block in enumerate(_children(model, arch.blocks)):
            for names in arch.of_block(block):
                full = tuple(f"{arch.blocks}.{i}.{name}" for name in names)
                stages.append(Stage(full, tuple(model.get_submodule(name) for name in full)))
        return stages, ""
    path = _block_list(model)
    found = {n: m for n, m in model.get_submodule(path).named_modules(prefix=path) if is_linear(m)}
    if not found:
        what = kind or type(model).__name__
        raise ModelError(330, f"{what} has no linear layers in {path}, so there is nothing to quantize.")
    note = f"architecture {kind!r} is not in the table: the linear layers of {path} are taken one by one"
    return [Stage((n,), (found[n],)) for n in _in_order(model, found)], note + _left_in_float(model)


def _in_order(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """Return the names of `layers`, given in the order of definition, in the order of the forward.

    A layer that the short forward does not call, such as an expert without tokens, follows the one defined before it:
    batches that do call it must not wait for it behind layers that they have yet to reach.
    """
    called = _first_calls(model, layers)
    keys, last = {}, -1
    for i, name in enumerate(layers):
        last = called.get(name, last)
        keys[name] = (last, i)
    return sorted(layers, key=keys.__getitem__)


def _first_calls(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, int]:
    """Run `model` on a few tokens; return each called layer's place in the order of first calls.

    Empty for a model without weights. Random states stay as they were.
    """
    device = next(model.parameters()).device
    if any(p.is_meta for p in model.parameters()):
        return {}
    places: dict[str, int] = {}

    def note(name: str) -> None:
        places.setdefault(name, len(places))

    handles = [m.register_forward_pre_hook(lambda m, args, n=name: note(n)) for name, m in layers.items()]
    devices = [device] if device.type == "cuda" else []
    try:
        # what fails here, calibration will meet and tell, and methods without data need no forward
        with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices):
            known: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            ids = torch.arange(_DRY_TOKENS, device=device)[None] % known
            getattr(model, "base_model", model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return places


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Return how many parameters each module of fused experts has that `find_stages` leaves in float, by full name.

    Their 3-D parameters are no linear layers; those of the table's architectures are taken apart, and none is left.
    """
    if knows(model):
        return {}
    path, found = _block_list(model), {}
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        fused = [p.numel() for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
        if fused and not isinstance(module, nn.Conv1d):
            found[name] = sum(fused)
    return found


def _left_in_float(model: nn.Module) -> str:
    """Return what the note has to say about fused experts."""
    found = fused_experts(model)
    places = dict.fromkeys(name.removeprefix(f"{_block_list(model)}.").split(".", 1)[-1] for name in found)
    count = sum(found.values())
    return f"; {count:,} parameters of fused experts in {', '.join(places)} stay in float" if count else ""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the full name of the list of decoder blocks, and the list; ModelError if none is found."""
    arch = TABLE.get(getattr(model.config, "model_type", ""))
    path = arch.blocks if arch is not None else _block_list(model)
    return path, _children(model, path)


def _children(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _block_list(model: nn.Module) -> str:
    """Return the path of the list of decoder blocks.

    The first of these to tell lists apart: it has linear layers; as many entries as the config says there are blocks;
    it lies in no other list, as experts do; it is the longest; it is the shallowest.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise ModelError(331, f"no decoder blocks were found in architecture {kind!r}; known are {', '.join(TABLE)}.")
    blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr, operator]

    def rank(name: str) -> tuple[bool, bool, bool, int, int]:
        found = lists[name]
        inner = any(name.startswith(f"{other}.") for other in lists)
        return any(map(is_linear, found.modules())), len(found) == blocks, not inner, len(found), -name.count(".")

    best: str = max(sorted(lists), key=rank)
    return best


def block_index(name: str) -> int | None:
    """Return the number of the decoder block in a layer's full name, or None."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def block_path(name: str) -> str | None:
    """Return the full name of the decoder block that a layer lies in, or None."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def is_linear(module: nn.Module) -> bool:
    """Tell whether `module` is a layer that can be quantized: nn.Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def get_weight(module: nn.Module) -> torch.Tensor:
    """Return a linear layer's weight as [out, in] in float32; a Conv1D stores it the other way round."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return (weight.T if isinstance(module, Conv1D) else weight).detach().float()


def as_parameter(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [out, in] as the layer's own parameter would hold it."""
    own = module.weight
    assert isinstance(own, torch.Tensor)
    return (weight.T if isinstance(module, Conv1D) else weight).to(own.dtype)


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Put `weight` [out, in] into a linear layer, in the layer's own dtype and orientation."""
    target = module.weight
    assert isinstance(target, torch.Tensor)
    with torch.no_grad():
        target.copy_(weight.T if isinstance(module, Conv1D) else weight)
