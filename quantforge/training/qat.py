"""Training a float model with all rounding in its forward (LLM-QAT, Liu et al., arXiv:2305.17888).

Weights, inputs of layers, and keys and values are rounded straight through in every pass, each on option. Ranges are
min-max, found anew in every pass: by default, as in the paper, weights have one a channel and inputs one a token.

Ours, not the paper's: keys are rounded after rotation, as a transformers `Cache` sees them, and before they are
written to it (the paper rounds what the projections give); keys and values have a range a token and head, as `KVCache`
stores them (there: a token); embeddings and the head stay as they are; and gradients are those of the plain
straight-through estimator unless `limit` is given.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantforge import pipeline
from quantforge.distill.straight_through import fake_quantize
from quantforge.errors import PlanError, RecipeError
from quantforge.models import activations, arch
from quantforge.models.kvcache import KVCache, KVFormat
from quantforge.numerics.formats import Format
from quantforge.plan import Plan, with_notes
from quantforge.result import Result
from quantforge.solvers.rtn import RTN
from quantforge.training.layers import (
    ComputedLinear,
    StraightInput,
    check_float32,
    computed_layers,
    settle_norms,
    train_norms,
)


class LatentLinear(ComputedLinear):
    """A linear layer that rounds its weight, the parameter `latent` [out, in], in every pass."""

    def __init__(self, own: nn.Module, fmt: Format, rule: str, limit: float | None, kept: torch.dtype) -> None:
        latent = arch.get_weight(own).contiguous()
        super().__init__(own, kept)
        self.format, self.rule, self.limit = fmt, rule, limit
        self.latent = nn.Parameter(latent)
        if self.bias is not None:
            self.bias.requires_grad_(True)

    def trained(self) -> dict[str, Tensor]:
        """Return the latent weight."""
        return {"latent": self.latent}

    def computed(self, trained: Mapping[str, Tensor]) -> Tensor:
        """Return the rounded weight, with the gradient of the latent one."""
        return fake_quantize(trained["latent"], self.format, self.rule, limit=self.limit)


def open_student(
    model: nn.Module,
    plan: Plan,
    *,
    weights: bool = True,
    inputs: bool = True,
    kv: KVFormat | None = None,
    limit: float | None = None,
) -> nn.Module:
    """Make the float `model` a student that rounds as `plan` says, in place; return it.

    plan     plain rounding of each layer: a plan of the recipe "rtn", such as `int4-channel` with inputs `int8-token`
    weights  whether layers round their weights; inputs: whether they round their inputs, if the plan has them do so
    kv       how keys and values are rounded, one token at a time; None: not at all
    limit    no gradient reaches weights of at least this size (2.0 in the authors' code); None: all get theirs

    The planned layers' weights and biases and all norms are trained; nothing else has `requires_grad`. With no
    rounding at all the student computes exactly what the model does. Raises PlanError for what cannot be trained, and
    RecipeError for a limit that is not above 0 and finite.
    """
    if limit is not None and not 0 < limit < math.inf:
        raise RecipeError(247, f"limit must be above 0 and finite, not {limit}; 2 is usual, and none leaves it out.")
    _check(model, plan)
    handled = [] if kv is None else _attentions(model, kv)
    activations.remove(model.modules())
    model.requires_grad_(False)
    for name, p in plan.layers.items():
        own = model.get_submodule(name)
        layer = own
        if weights:
            assert isinstance(p.solver, RTN)
            layer = LatentLinear(own, p.format, p.solver.range, limit, plan.dtype)
            model.set_submodule(name, layer)
        else:
            own.weight.requires_grad_(True)
        if inputs and p.inputs is not None:
            activations.gate(layer, StraightInput(p.inputs))
    train_norms(model, plan.dtype)
    for module in handled:
        assert kv is not None
        _CacheGate.before(module, kv)
    return model


def settle(model: nn.Module, plan: Plan, *, source: str, tokenizer: Any = None) -> Result:
    """Return the trained student as a result of `plan`: its weights rounded, its norms and biases as stored.

    source     name of the float model
    tokenizer  kept beside the model
    The result's model, the same module in place, gives what the student gave, but for the cache: keys and values are
    floats again unless it is run through a `KVCache` of the trained format, as `evaluate` does with `kv`. Scores with
    the rounded cache are those of the student before this, or of such a run.
    """
    kv = _CacheGate.remove(model)
    for name, layer in computed_layers(model).items():
        assert isinstance(layer, LatentLinear)
        model.set_submodule(name, layer.restored(layer.latent.detach()))
    settle_norms(model)
    activations.remove(model.modules())
    model.requires_grad_(True).eval()
    layers = pipeline.quantize(model, plan)
    notes = ["trained with rounding in the forward; losses of layers are those of the trained weights"]
    notes += [f"trained for keys and values in {kv}"] if kv is not None else []
    return Result(model, with_notes(plan, notes), tuple(layers), tokenizer, source, {}, 0.0, None)


def _check(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError unless `plan` is plain rounding of a float32 model, with ranges that each pass finds anew."""
    recipe = plan.recipe
    others = [*recipe.transforms, *recipe.tuners, *(c for p in plan.layers.values() for c in p.corrections)]
    others += [p.solver for p in plan.layers.values() if not isinstance(p.solver, RTN)]
    if others:
        what = type(others[0]).__name__
        raise PlanError(295, f"quantization-aware training rounds plainly, without {what}; the method rtn works.")
    if plan.needs:
        what = ", ".join(sorted(plan.needs))
        raise PlanError(295, f"{recipe.label} needs calibration ({what}); inputs int8-token and range minmax do not.")
    check_float32(model)


def _attentions(model: nn.Module, kv: KVFormat) -> list[nn.Module]:
    """Return the modules that write keys and values to a cache."""
    if kv.keys != "token" or kv.window or kv.sinks:
        raise PlanError(295, f"keys and values are trained with a range a token, which {kv} lacks; int8-token works.")
    found = []
    for module in model.modules():
        takes = "past_key_values" in inspect.signature(type(module).forward).parameters
        if takes and type(module).__name__.endswith("Attention"):
            found.append(module)
    if not found:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise PlanError(
            295, f"no attention of {kind!r} takes a cache, so keys and values cannot be rounded; leave kv out."
        )
    return found


class _CacheGate:
    """A pre-hook on attention that puts a rounding cache before the one it is given, or in place of none."""

    def __init__(self, fmt: KVFormat) -> None:
        self.format = fmt
        self.handle: RemovableHandle | None = None

    @classmethod
    def before(cls, module: nn.Module, fmt: KVFormat) -> None:
        gate = cls(fmt)
        gate.handle = module.register_forward_pre_hook(gate, with_kwargs=True)

    @classmethod
    def remove(cls, model: nn.Module) -> KVFormat | None:
        """Take all of them away; return their format."""
        found = None
        for module in model.modules():
            for hook in list(module._forward_pre_hooks.values()):
                if isinstance(hook, cls):
                    assert hook.handle is not None
                    hook.handle.remove()
                    found = hook.format
        return found

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return the arguments with the cache replaced; one that rounds by itself is left alone."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, KVCache):
            kwargs = {**kwargs, "past_key_values": _RoundingCache(cache, self.format)}
        return args, kwargs


class _RoundingCache:
    """Rounds keys and values, straight through, before they are written to a cache, or handed back if there is none."""

    def __init__(self, cache: Any, fmt: KVFormat) -> None:
        self._cache, self._format = cache, fmt

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what attention is to see of keys and values [batch, heads, tokens, channels]."""
        keys, values = _rounded(keys, self._format.key_format), _rounded(values, self._format.value_format)
        if self._cache is None:
            return keys, values
        found: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _rounded(x: Tensor, fmt: Format) -> Tensor:
    """Return x [..., channels] as a cache stores it, with its gradient."""
    flat = x.reshape(-1, x.shape[-1]).float()
    return fake_quantize(flat, fmt).to(x.dtype).view(x.shape)
