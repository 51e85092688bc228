"""The walk: each layer evaluated once a token, on inputs that the compressed layers before it made."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quantforge import pipeline, recipe, solving
from quantforge import plan as planning
from quantforge.calibrate.stats import Hessian, Statistics
from quantforge.models import arch, tiny
from quantforge.models.walk import Stage, walk

KINDS = tiny.names()


def tokens(windows: int, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(seed))


def forward(model: nn.Module) -> Callable[[Tensor], object]:
    return lambda batch: model(input_ids=batch, use_cache=False)


def coarsen(stage: Stage) -> None:
    """Stand in for a solver: change the stage's weights a lot, and the same way whenever it is asked."""
    for module in stage.modules:
        arch.set_weight(module, (arch.get_weight(module) * 4).round() / 4)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_evaluated_once_a_token_and_observed_once_a_batch(kind):
    model = tiny.make(kind)
    stages, _ = arch.find_stages(model)
    evaluated: Counter[str] = Counter()
    observed: Counter[tuple[int, int]] = Counter()
    watching = [
        m.register_forward_hook(lambda m, args, out, n=n: evaluated.update({n: args[0].shape[:-1].numel()}))
        for stage in stages
        for n, m in zip(stage.names, stage.modules, strict=True)
    ]
    batches = [tokens(2), tokens(2, seed=1), tokens(1, seed=2)]
    yielded = []
    for index in walk(forward(model), batches, stages, lambda i, b, x: observed.update([(i, b)])):
        assert {b for i, b in observed if i == index} == {0, 1, 2}, "yielded before every batch was there"
        assert not any(evaluated[n] for n in stages[index].names), "evaluated before it was solved"
        yielded.append(index)
    assert yielded == list(range(len(stages)))
    assert evaluated == {n: 60 for stage in stages for n in stage.names}
    assert observed == {(i, b): 1 for i in range(len(stages)) for b in range(3)}
    for handle in watching:
        handle.remove()
    assert hooks(model) == 0


def test_a_llama_block_collects_four_hessians_that_see_every_token(monkeypatch):
    made = []

    class Counted(Hessian):
        def __init__(self, width: int, device: torch.device | None = None) -> None:
            super().__init__(width, device)
            made.append(self)

    monkeypatch.setattr("quantforge.calibrate.stats.Hessian", Counted)
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 24)
    model = tiny.make("llama")
    plan = planning.make(model, recipe.load("gptq", group_size=32), torch.float32)
    pipeline.quantize(model, plan, tokens(5))
    assert [h.tokens for h in made] == [60] * 8


def naive(model: nn.Module, batches: list[Tensor], stages: list[Stage], solve: Callable[[int, Tensor], None]) -> None:
    """Run the whole model anew for each stage, and hand `solve` the inputs of its first layer."""
    for index, stage in enumerate(stages):
        seen: list[Tensor] = []
        handle = stage.modules[0].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                forward(model)(batch)
        handle.remove()
        solve(index, torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_those_of_a_model_rerun_for_every_stage(kind):
    model, twin, float_model = (tiny.make(kind) for _ in range(3))
    batches = [tokens(2), tokens(3, seed=1)]
    stages, _ = arch.find_stages(model)
    seen: dict[int, list[Tensor]] = {}
    for index in walk(
        forward(model), batches, stages, lambda i, b, x: seen.setdefault(i, []).append(x.reshape(-1, x.shape[-1]))
    ):
        coarsen(stages[index])
    expected: dict[int, Tensor] = {}
    twin_stages, _ = arch.find_stages(twin)

    def solve(index: int, x: Tensor) -> None:
        expected[index] = x
        coarsen(twin_stages[index])

    naive(twin, batches, twin_stages, solve)
    untouched: dict[int, Tensor] = {}
    naive(float_model, batches, arch.find_stages(float_model)[0], untouched.__setitem__)
    for index in range(len(stages)):
        x = torch.cat(seen[index]).double()
        want = expected[index].double()
        torch.testing.assert_close(x.T @ x, want.T @ want, rtol=1e-5, atol=1e-5)
        if index:  # else the test would not tell the inputs of compressed layers from those of float ones
            assert (x - untouched[index]).norm() > 0.01 * x.norm()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_gptq_chooses_the_codes_that_rerunning_the_model_for_every_stage_gives(kind, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 24)
    model, twin = tiny.make(kind), tiny.make(kind)
    ids = tokens(8)
    chosen = recipe.load("gptq", group_size=32)
    plan = planning.make(model, chosen, torch.float32)
    got = {layer.name: layer.weight.base.codes for layer in pipeline.quantize(model, plan, ids)}
    stages, _ = arch.find_stages(twin)
    expected: dict[str, Tensor] = {}

    def solve(index: int, x: Tensor) -> None:
        found = Statistics(frozenset({"hessian"}), x.shape[-1])
        for batch, part in enumerate(x.split(24)):
            found.add(batch, part)
        for layer in solving.solve(stages[index], plan, found, lambda layer: None, total=ids.numel()):
            expected[layer.name] = layer.weight.base.codes

    naive(twin, list(ids.split(2)), stages, solve)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_splitting_the_batches_leaves_nearly_every_code_as_it_is(monkeypatch):
    found = []
    for size in (12, 10_000):
        monkeypatch.setattr(pipeline, "BATCH_TOKENS", size)
        model = tiny.make("llama")
        plan = planning.make(model, recipe.load("gptq", group_size=32), torch.float32)
        rows = pipeline.quantize(model, plan, tokens(16, 32))
        found.append(torch.cat([layer.weight.base.codes.flatten() for layer in rows]))
    assert (found[0] == found[1]).double().mean() > 0.99


def test_a_stage_that_no_batch_reaches_is_yielded_all_the_same():
    model = tiny.make("llama")
    stages, _ = arch.find_stages(model)
    stages = [*stages[:3], Stage(("idle",), (nn.Linear(4, 4),)), *stages[3:]]
    seen = set()
    assert list(walk(forward(model), [tokens(2)], stages, lambda i, b, x: seen.add(i))) == list(range(len(stages)))
    assert seen == set(range(len(stages))) - {3}


class Routed(nn.Module):
    """Calls `odd` only for batches whose first token is odd, and `late` before `first` for those that are large."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.first, self.odd, self.late = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if ids[0, 0] >= 10:
            return self.first(self.late(x))
        x = self.first(x)
        if ids[0, 0] % 2:
            x = self.odd(x)
        return self.late(x)


@pytest.mark.parametrize(
    ("firsts", "arrivals"),
    [
        ((1, 2, 3, 4), {0: 4, 1: 2, 2: 4}),
        ((2, 4), {0: 2, 2: 2}),
        # a batch that comes in another order meets `first` when it is solved already
        ((1, 11), {0: 1, 1: 1, 2: 2}),
    ],
)
def test_a_module_that_only_some_batches_call_holds_nobody_up(firsts, arrivals):
    model = Routed()
    stages = [Stage((n,), (model.get_submodule(n),)) for n in ("first", "odd", "late")]
    finished = []

    def run(ids: Tensor) -> None:
        model(ids)
        finished.append(int(ids[0, 0]))

    seen: Counter[int] = Counter()
    batches = [torch.tensor([[n, 0]]) for n in firsts]
    assert list(walk(run, batches, stages, lambda i, b, x: seen.update([i]))) == [0, 1, 2]
    assert seen == arrivals
    assert sorted(finished) == sorted(firsts)


class TroubleError(Exception):
    """What the tests below raise."""


def watched(model: nn.Module, open_forwards: list[int]) -> Callable[[Tensor], object]:
    """Return the forward of `model`, which counts the batches that are inside it in open_forwards[0]."""

    def run(batch: Tensor) -> None:
        open_forwards[0] += 1
        try:
            model(input_ids=batch, use_cache=False)
        finally:
            open_forwards[0] -= 1

    return run


@pytest.mark.parametrize("at", [0, 3, 7])
def test_an_error_of_the_consumer_passes_through_and_leaves_no_hook_or_batch_behind(at):
    model, inside = tiny.make("llama"), [0]
    stages, _ = arch.find_stages(model)

    def consume() -> None:
        for index in walk(watched(model, inside), [tokens(1), tokens(1)], stages, lambda i, b, x: None):
            assert inside == [2]
            if index == at:
                raise TroubleError

    with pytest.raises(TroubleError):
        consume()
    assert inside == [0]
    assert hooks(model) == 0


def test_a_consumer_that_stops_early_leaves_no_hook_or_batch_behind():
    model, inside = tiny.make("llama"), [0]
    steps = walk(watched(model, inside), [tokens(1), tokens(1)], arch.find_stages(model)[0], lambda i, b, x: None)
    next(steps)
    assert inside == [2]
    steps.close()
    assert inside == [0]
    assert hooks(model) == 0


@pytest.mark.parametrize("where", ["model.layers.0.self_attn", "model.layers.1.mlp.act_fn"])
def test_an_error_in_the_forward_passes_through_and_leaves_no_hook_or_batch_behind(where):
    model, inside = tiny.make("llama"), [0]
    calls = [0]

    def fail(module: nn.Module, args: object, out: object) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise TroubleError

    handle = model.get_submodule(where).register_forward_hook(fail)
    with pytest.raises(TroubleError):
        list(walk(watched(model, inside), [tokens(1)] * 3, arch.find_stages(model)[0], lambda i, b, x: None))
    handle.remove()
    assert inside == [0]
    assert hooks(model) == 0


def test_an_error_in_the_observer_passes_through_and_leaves_no_hook_behind():
    model = tiny.make("llama")

    def observe(index: int, batch: int, x: Tensor) -> None:
        if (index, batch) == (2, 1):
            raise TroubleError

    with pytest.raises(TroubleError):
        list(walk(forward(model), [tokens(1)] * 2, arch.find_stages(model)[0], observe))
    assert hooks(model) == 0


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_no_graph_is_recorded_and_the_callers_grad_mode_is_left_as_it_was(enabled, count):
    model = tiny.make("llama")
    recorded = []
    watching = [
        m.register_forward_hook(lambda m, args, out: recorded.append(out.requires_grad))
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not model.lm_head
    ]
    with torch.set_grad_enabled(enabled):
        for _ in walk(forward(model), [tokens(1)] * count, arch.find_stages(model)[0], lambda i, b, x: None):
            pass
        after = torch.is_grad_enabled()
    for handle in watching:
        handle.remove()
    assert len(recorded) == 14 * count
    assert not any(recorded)
    assert after == enabled


def test_the_model_computes_the_same_after_a_walk_that_changed_nothing():
    model = tiny.make("gemma2")
    with torch.no_grad():
        before = model(tokens(2)).logits
    list(walk(forward(model), [tokens(2)], arch.find_stages(model)[0], lambda i, b, x: None))
    with torch.no_grad():
        assert torch.equal(model(tokens(2)).logits, before)
    assert copy.deepcopy(model) is not model  # nothing that cannot be copied, such as a greenlet, was left in it
