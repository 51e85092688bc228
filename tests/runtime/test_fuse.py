"""Layers of one input computed as one product: the same numbers, whatever happens to the input in between."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantforge.models import tiny
from quantforge.numerics.formats import NAMED, parse
from quantforge.numerics.inputs import QInput, parse_inputs
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import encode
from quantforge.numerics.residuals import Columns, LowRank
from quantforge.runtime import fuse, table
from quantforge.runtime.kernel import PackedLinear

WIDTH, ROWS = 64, (32, 16, 48)


def weights(fmt="int4-g32-asym", inputs=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    found = [torch.randn(rows, WIDTH, generator=rng) for rows in ROWS]
    rounds = None if inputs is None else QInput(parse_inputs(inputs))
    return [QWeight(encode(w, NAMED.get(fmt) or parse(fmt)), {}, (), rounds) for w in found]


def alone(each, biases):
    return [PackedLinear(table.kernel(w, table.choose(w)), b) for w, b in zip(each, biases, strict=True)]


def joined(each, biases):
    whole = fuse.stack(each)
    joint = fuse.Joint(table.kernel(whole, table.choose(whole)), ROWS)
    return [fuse.JointLinear(joint, i, b) for i, b in enumerate(biases)]


class Counting:
    """A kernel that counts its products."""

    operator, nbytes = "counting", 0
    shape = (sum(ROWS), WIDTH)

    def __init__(self):
        self.calls = 0
        self.weight = torch.randn(self.shape)

    def product(self, x):
        self.calls += 1
        return x @ self.weight.T


@given(
    st.sampled_from(
        ["int4-g32-asym", "int4-g64-sym-bf16", "int3-g16-asym", "hqq3-g64", "spqr3-g16", "int8-channel-sym"]
    ),
    st.booleans(),
    st.sampled_from([(1, 1), (2, 5), (3,), (0, 4)]),
    st.integers(0, 1000),
)
def test_joined_layers_give_what_they_give_alone(fmt, with_bias, batch, seed):
    if fmt == "spqr3-g16" and fuse.stack(weights(fmt)) is None:
        return
    rng = torch.Generator().manual_seed(seed)
    biases = [torch.randn(rows, generator=rng) if with_bias else None for rows in ROWS]
    x = torch.randn(*batch, WIDTH, generator=rng)
    each = weights(fmt, None, seed)
    for one, other in zip(joined(each, biases), alone(each, biases), strict=True):
        y = one(x)
        assert y.shape == (*batch, other.out_features)
        assert y.is_contiguous()
        assert torch.equal(y, other(x))


@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor"])
def test_rounded_inputs_are_the_same_when_joined(inputs):
    each = weights("int8-channel-sym", inputs)
    x = torch.randn(5, WIDTH)
    for one, other in zip(joined(each, [None] * 3), alone(each, [None] * 3), strict=True):
        assert torch.equal(one(x), other(x))


@pytest.fixture
def counted():
    kernel = Counting()
    joint = fuse.Joint(kernel, ROWS)
    return kernel, [fuse.JointLinear(joint, i) for i in range(len(ROWS))]


def parts(kernel, x):
    return (x @ kernel.weight.T).split(ROWS, -1)


def test_one_input_is_one_product_and_nothing_is_kept(counted):
    kernel, layers = counted
    x = torch.randn(2, 3, WIDTH)
    for order in ((0, 1, 2), (2, 0, 1)):
        before = kernel.calls
        for i in order:
            assert torch.equal(layers[i](x), parts(kernel, x)[i])
        assert kernel.calls == before + 1
        assert not layers[0].joint._kept


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_input_that_was_changed_in_place_is_another(counted, mode):
    kernel, layers = counted
    with mode():
        x = torch.randn(4, WIDTH)
        layers[0](x)
        x.mul_(2)
        assert torch.equal(layers[1](x), parts(kernel, x)[1])
        x[1:].zero_()  # through a view
        assert torch.equal(layers[2](x), parts(kernel, x)[2])


def test_a_normal_tensor_changed_in_inference_mode_is_another(counted):
    kernel, layers = counted
    x = torch.randn(4, WIDTH)
    layers[0](x)
    with torch.inference_mode():
        x.mul_(3)
        assert torch.equal(layers[1](x), parts(kernel, x)[1])


def test_equal_tensors_are_not_the_same_tensor(counted):
    kernel, layers = counted
    x, other = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    layers[0](x)
    assert torch.equal(layers[1](other), parts(kernel, other)[1])
    assert torch.equal(layers[2](x), parts(kernel, x)[2])


def test_an_input_that_is_gone_is_not_mistaken_for_one_in_its_place(counted):
    kernel, layers = counted
    for _ in range(20):
        layers[0](torch.randn(4, WIDTH))
        fresh = torch.randn(4, WIDTH)  # often where the last one was
        assert torch.equal(layers[1](fresh), parts(kernel, fresh)[1])


def test_the_product_of_an_input_that_is_gone_is_let_go(counted):
    kernel, layers = counted
    x = torch.randn(4, WIDTH)
    layers[0](x)
    assert layers[0].joint._kept
    del x
    assert not layers[0].joint._kept
    # one in its place is not let go with it
    x, other = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    layers[0](x)
    layers[0](other)
    del x
    before = kernel.calls
    assert torch.equal(layers[1](other), parts(kernel, other)[1])
    assert kernel.calls == before


def test_inputs_in_any_order_of_memory_have_the_same_product():
    each = weights("int8-channel-sym")
    layers = joined(each, [None] * 3)
    x = torch.randn(WIDTH, 5).T
    for one, other in zip(layers, alone(each, [None] * 3), strict=True):
        assert torch.equal(one(x), other(x.contiguous()))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_layer_that_is_called_twice_is_not_given_what_its_caller_has_changed(counted, tokens):
    kernel, layers = counted
    x = torch.randn(tokens, WIDTH)
    layers[0](x).zero_()  # the caller's own memory
    assert torch.equal(layers[0](x), parts(kernel, x)[0])
    assert torch.equal(layers[1](x), parts(kernel, x)[1])


def test_threads_do_not_take_each_others_products(counted):
    kernel, layers = counted
    wrong, barrier = [], threading.Barrier(4)

    def run(seed):
        rng = torch.Generator().manual_seed(seed)
        barrier.wait()
        for _ in range(50):
            x = torch.randn(3, WIDTH, generator=rng)
            if not all(torch.equal(layer(x), part) for layer, part in zip(layers, parts(kernel, x), strict=True)):
                wrong.append(seed)

    running = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


def test_what_differs_is_not_stacked():
    a, b, c = weights("int4-g32-asym")
    assert fuse.stack([a, b, c]) is not None
    assert fuse.stack([a, weights("int4-g64-asym")[1]]) is None
    assert fuse.stack([a, weights("int4-g32-asym", "int8-token")[1]]) is None
    factors = LowRank(torch.zeros(32, 1), torch.zeros(1, WIDTH))
    assert fuse.stack([QWeight(a.base, {}, (factors,)), b]) is None
    assert fuse.stack(weights("int4-tensor-sym")) is None
    assert fuse.stack(weights("int4-b16x32-sym")) is None
    kept = [
        QWeight(w.base, {}, (Columns(torch.tensor([i]), torch.zeros(w.base.shape[0], 1)),))
        for i, w in enumerate((a, b))
    ]
    assert fuse.stack(kept) is None


def test_static_ranges_and_spared_channels_must_be_the_same():
    from quantforge.numerics.inputs import settle

    one = settle(parse_inputs("int8-tensor-static"), -torch.ones(4), torch.ones(4), torch.float32)
    same = settle(parse_inputs("int8-tensor-static"), -torch.ones(4), torch.ones(4), torch.float32)
    other = settle(parse_inputs("int8-tensor-static"), -2 * torch.ones(4), torch.ones(4), torch.float32)
    assert fuse.same_inputs(one, same)
    assert not fuse.same_inputs(one, other)
    assert not fuse.same_inputs(one, None)


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_partners_are_those_of_the_architecture(kind):
    model = tiny.make(kind)
    from quantforge.models import arch

    stages = [stage.names for stage in arch.find_stages(model)[0]]
    names = [name for stage in stages for name in stage]
    assert fuse.partners(model, names[::-1]) == stages
    assert fuse.partners(model, ["lm_head", names[0]]) == [(names[0],), ("lm_head",)]
