"""Scales folded into what comes before a layer: which module can take them, for each architecture, exactly.

Multiplying the input channels of a layer's weight by s leaves the model as it was if what produces those channels is
divided by s: a norm's weight and bias, or the rows of a linear layer from which the channels come without any
non-linearity that does not commute with a positive factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantforge.models import arch, moe


@dataclass(frozen=True)
class Producer:
    """What can take the inverse scales of a stage.

    name   the module, within its block
    kind   "norm"; "norm + 1" where the weight is stored less one (Gemma); "rows" of a linear layer; "values": the rows
           of a linear layer that become attention's values, which all query heads of a group share
    last   only the last rows, as many as the consumers need, belong to these channels (fused projections)
    """

    name: str
    kind: str
    last: bool = False


_VALUES = Producer("self_attn.v_proj", "values")
_UP = Producer("mlp.up_proj", "rows")
_LLAMA = (
    Producer("input_layernorm", "norm"),
    _VALUES,
    Producer("post_attention_layernorm", "norm"),
    _UP,
)
# In a block of experts, it feeds all of them and the router
_MIXTURE_NORM = Producer("post_attention_layernorm", "norm")
# Gemma's post_attention_layernorm feeds the residual stream, not the MLP
_GEMMA = (
    Producer("input_layernorm", "norm + 1"),
    _VALUES,
    Producer("pre_feedforward_layernorm", "norm + 1"),
    _UP,
)

# A producer for each stage of the architecture's row in arch.TABLE; None where nothing can take a scale
TABLE: dict[str, tuple[Producer | None, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA,
    "opt": (
        Producer("self_attn_layer_norm", "norm"),
        _VALUES,
        Producer("final_layer_norm", "norm"),
        Producer("fc1", "rows"),  # through a ReLU, which a positive factor passes
    ),
    "gpt2": (
        Producer("ln_1", "norm"),
        Producer("attn.c_attn", "values", last=True),
        Producer("ln_2", "norm"),
        None,  # the GELU between c_fc and c_proj lets no factor through
    ),
    "mixtral": _LLAMA[:2],
    "qwen3_moe": _LLAMA,
    "phi3": (
        Producer("input_layernorm", "norm"),
        Producer("self_attn.qkv_proj", "values", last=True),
        Producer("post_attention_layernorm", "norm"),
        Producer("mlp.gate_up_proj", "rows", last=True),
    ),
}


@dataclass(frozen=True)
class Fold:
    """One group of layers that read the same input, and what can take the inverse of their scales.

    consumers  full names of the layers
    observed   full name of the module at which their input is seen
    producer   with its full name
    heads      (query heads, key and value heads, width of a head) where the producer makes attention's values
    extra      full names of modules that read the same input and are rescaled with it, but not quantized: routers
    """

    consumers: tuple[str, ...]
    observed: str
    producer: Producer
    heads: tuple[int, int, int] | None = None
    extra: tuple[str, ...] = ()

    def tie(self, x: Tensor) -> Tensor:
        """Return `x` [in] with its mean wherever the producer can only hold one number for several channels.

        Query heads of one group read the same values.
        """
        if self.heads is None or self.heads[0] == self.heads[1]:
            return x
        query, groups, width = self.heads
        mean = x.view(groups, query // groups, width).mean(1, keepdim=True)
        return mean.expand(-1, query // groups, -1).reshape(-1)

    def apply(self, model: nn.Module, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply the consumers' input channels by `scales` [in] and divide the producer's outputs by them.

        Returns the scales that were applied.

        What a norm can store in `dtype` decides: the scales are adjusted to it, so that nothing is lost to rounding.
        A producer's bias is rounded to `dtype`, in which it will be saved.
        """
        module = model.get_submodule(self.producer.name)
        assert bool((scales > 0).all()), f"{self.producer.name}: a scale is not positive"
        with torch.no_grad():
            if self.producer.kind.startswith("norm"):
                scales = _divide_norm(module, scales, 1.0 if self.producer.kind == "norm + 1" else 0.0, dtype)
            else:
                _divide_rows(module, self._per_row(scales), self.producer.last, dtype)
            for name in (*self.consumers, *self.extra):
                consumer = model.get_submodule(name)
                weight = consumer.weight
                assert isinstance(weight, Tensor)
                weight.mul_(scales[:, None] if isinstance(consumer, Conv1D) else scales)
        return scales

    def _per_row(self, scales: Tensor) -> Tensor:
        """Return one scale a row of the producer: of the query heads that share one, the first has it."""
        if self.heads is None:
            return scales
        query, groups, width = self.heads
        return scales.view(groups, query // groups, width)[:, 0].reshape(-1)


def _divide_norm(module: nn.Module, scales: Tensor, shift: float, dtype: torch.dtype) -> Tensor:
    """Divide a norm's weight and bias by `scales`, as `dtype` holds the result; return the scales that came of it."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    full = weight.float() + shift  # in bfloat16, the sum would lose what Gemma's own forward keeps
    new = (full / scales - shift).to(dtype).float()
    usable = (full != 0) & (new + shift != 0)
    exact = torch.where(usable, full / (new + shift), 1.0)
    # where rounding would decide the scale, leave the channel alone
    sound = usable & ((exact / scales - 1).abs() < 0.1)
    exact = torch.where(sound, exact, 1.0)
    weight.copy_(torch.where(sound, new, weight.float()))
    if isinstance(bias, Tensor):
        bias.copy_((bias / exact).to(dtype))
    return exact


def _divide_rows(module: nn.Module, scales: Tensor, last: bool, dtype: torch.dtype) -> None:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    rows = weight.T if isinstance(module, Conv1D) else weight
    part = slice(rows.shape[0] - len(scales), None) if last else slice(None)
    rows[part].div_(scales[:, None])
    if isinstance(bias, Tensor):
        bias[part] = (bias[part] / scales).to(dtype).to(bias.dtype)


def find(model: nn.Module) -> list[Fold]:
    """Return the groups of `model` whose scales can be folded exactly, in the order of its forward.

    Empty for an architecture that the table lacks, and for one whose norms come after the residual is added.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kind = getattr(model.config, "model_type", "")
    if kind not in TABLE or getattr(config, "do_layer_norm_before", True) is False:
        return []
    row = arch.TABLE[kind]
    producers = dict(zip(row.stages, TABLE[kind], strict=True))
    folds = []
    blocks = model.get_submodule(row.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for i, block in enumerate(blocks):
        path = f"{row.blocks}.{i}"
        for names in row.of_block(block):
            producer = producers.get(names)
            if producer is None or (kind == "opt" and producer.name == "fc1" and config.activation_function != "relu"):
                continue
            heads = _heads(config) if producer.kind == "values" else None
            folds.append(_fold(path, names, names[0], producer, heads))
        experts = [names for names in row.of_block(block) if names[0].startswith(moe.EXPERTS)]
        folds += _of_experts(path, experts)
    # a norm may have no weight
    return [fold for fold in folds if getattr(model.get_submodule(fold.producer.name), "weight", None) is not None]


def _of_experts(block: str, stages: list[tuple[str, ...]]) -> list[Fold]:
    """Return the folds of a block of experts: its norm feeds all of them and the router, each `up` its own `down`."""
    if not stages:
        return []
    inputs, outputs = stages[::2], stages[1::2]
    first = tuple(name for names in inputs for name in names)
    folds = [_fold(block, first, moe.ROUTER, _MIXTURE_NORM, extra=(moe.ROUTER,))]
    for (_, up), down in zip(inputs, outputs, strict=True):
        folds.append(_fold(block, down, down[0], Producer(up, "rows")))
    return folds


def _fold(
    block: str,
    consumers: tuple[str, ...],
    observed: str,
    producer: Producer,
    heads: tuple[int, int, int] | None = None,
    extra: tuple[str, ...] = (),
) -> Fold:
    """Return a Fold with full names, from names within `block`."""
    full = [tuple(f"{block}.{name}" for name in names) for names in (consumers, extra)]
    named = Producer(f"{block}.{producer.name}", producer.kind, producer.last)
    return Fold(full[0], f"{block}.{observed}", named, heads, full[1])


def _heads(config: object) -> tuple[int, int, int]:
    count: Callable[[str], int | None] = lambda name: getattr(config, name, None)  # noqa: E731
    query = count("num_attention_heads")
    assert query is not None
    groups = count("num_key_value_heads") or query
    width = count("head_dim") or config.hidden_size // query  # type: ignore[attr-defined]
    return query, groups, width
