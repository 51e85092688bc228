"""Speed of packed layers and models beside float32 in the same process: `make bench`. Figures, never thresholds.

Samples are taken in turn, and those during which the process did not have its processors to itself are rejected. Layers
are more than any cache holds, and each is used once a sample.
"""

import os
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import quantforge
from quantforge.benchmark.measure import Watch, generation, in_turn
from quantforge.models import load as loading
from quantforge.numerics.formats import parse
from quantforge.numerics.inputs import QInput, parse_inputs
from quantforge.numerics.problem import QWeight
from quantforge.numerics.products import linear
from quantforge.numerics.qtensor import encode
from quantforge.runtime import int8, load, table
from quantforge.runtime.kernel import PackedLinear

pytestmark = pytest.mark.bench

WIDTH = 2048
BEYOND = 320e6  # bytes of one kind of layer
ROUNDS = 15


@pytest.fixture(scope="module", autouse=True)
def every_core():
    """Use all cores, as the command line does; the other tests use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def weight(fmt, inputs=None):
    rng = torch.Generator().manual_seed(0)
    base = encode(torch.randn(WIDTH, WIDTH, generator=rng), parse(fmt))
    return QWeight(base, {}, (), None if inputs is None else QInput(parse_inputs(inputs)))


def kernels(w, pack=None):
    """Return as many kernels of `w`, each in memory of its own, as no cache holds."""
    made = pack or (lambda: table.kernel(w, table.choose(w)))
    first = made()
    return [first, *(made() for _ in range(int(BEYOND / first.nbytes)))]


def floats():
    return [torch.randn(WIDTH, WIDTH) for _ in range(int(BEYOND / (4 * WIDTH * WIDTH)) + 1)]


def timed(calls, x):
    watch = Watch()
    for call in calls:
        call(x)
    return (watch.split(),)


def ratios(benchmark, ways, x, baseline):
    """Time each way's layers in turn; record seconds a layer and the ratios to `baseline`."""
    found = {}

    def run():
        found.update(in_turn({name: partial(timed, calls, x) for name, calls in ways.items()}, ROUNDS, warm_up=2))

    with torch.no_grad():
        benchmark.pedantic(run, rounds=1)
    seconds = {name: found[name][0].seconds / len(calls) for name, calls in ways.items()}
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "seconds_a_layer": seconds,
        "kept": {name: part.kept for name, (part,) in found.items()},
        "rejected": {name: part.rejected for name, (part,) in found.items()},
        "times_float32": {name: seconds[baseline] / own for name, own in seconds.items()},
    }


@pytest.mark.parametrize("tokens", [1, 16])
def test_layers_with_float_inputs(benchmark, tokens):
    """Layers of 2048 x 2048 with few tokens: int4 in groups of 128, int8 in two digits, and by torch's own operator."""
    own = weight("int8-channel-sym")
    ways = {
        "float32": [partial(F.linear, weight=w) for w in floats()],
        "int4": [k.product for k in kernels(weight("int4-g128-sym-bf16"))],
        "int4 asymmetric g64": [k.product for k in kernels(weight("int4-g64-asym-bf16"))],
        "int8 in two digits": [k.product for k in kernels(own)],
        "int8": [k.product for k in kernels(own, lambda: int8.pack(own, "cpu"))],
    }
    ratios(benchmark, ways, torch.randn(tokens, WIDTH), "float32")


@pytest.mark.parametrize("tokens", [1, 256])
def test_layers_with_rounded_inputs(benchmark, tokens):
    """W8A8 layers with quantizing and rescaling, beside float32 by F.linear and by oneDNN, the faster one where many.

    `times_float32` is to F.linear; the ratio to oneDNN's product follows from the seconds.
    """
    ways = {
        "float32": [partial(F.linear, weight=w) for w in floats()],
        "float32 by oneDNN": [partial(linear, weight=w) for w in floats()],
        "w8a8": [k.product for k in kernels(weight("int8-channel-sym", "int8-token"))],
    }
    ratios(benchmark, ways, torch.randn(tokens, WIDTH), "float32")
    seconds = benchmark.extra_info["seconds_a_layer"]
    benchmark.extra_info["w8a8_times_onednn"] = seconds["float32 by oneDNN"] / seconds["w8a8"]


INT4 = {"method": "rtn", "bits": 4, "group_size": 64}
W8A8 = {"method": "rtn", "bits": 8, "group_size": -1, "symmetric": True, "inputs": "int8-token"}
INT8 = {"method": "rtn", "bits": 8, "group_size": -1, "symmetric": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folders of the demo model in four formats."""
    place = tmp_path_factory.mktemp("speed")
    made = {"int4": INT4, "w8a8": W8A8, "int8": INT8}
    for name, how in made.items():
        quantforge.quantize(None, out=place / name, **how)
    with loading.quiet():
        quantforge.load(place / "int4", torch.bfloat16, packed=False).save_pretrained(place / "float")
    return {name: place / name for name in (*made, "float")}


def test_generation(benchmark, saved):
    """The demo model's prompt of 512 tokens and 32 tokens more, packed and in float32."""
    models = {"float32": quantforge.load(saved["int4"], torch.float32, packed=False)}
    packed = {name: quantforge.load(saved[name], torch.float32) for name in ("int4", "w8a8", "int8")}
    packed["int4, bfloat16"] = quantforge.load(saved["int4"], torch.bfloat16)
    assert all(any(isinstance(m, PackedLinear) for m in model.modules()) for model in packed.values())
    models |= packed
    ids = torch.randint(1000, 40_000, (1, 512), generator=torch.Generator().manual_seed(0))
    found = {}

    def run():
        calls = {name: partial(generation, model, ids, 32) for name, model in models.items()}
        found.update(in_turn(calls, 5))

    benchmark.pedantic(run, rounds=1)
    seconds = {name: [part.seconds for part in parts] for name, parts in found.items()}
    baseline = seconds["float32"]
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "prompt_seconds": {name: prompt for name, (prompt, _) in seconds.items()},
        "tokens_per_second": {name: 32 / rest for name, (_, rest) in seconds.items()},
        "prompt_times_float32": {name: baseline[0] / prompt for name, (prompt, _) in seconds.items()},
        "tokens_times_float32": {name: baseline[1] / rest for name, (_, rest) in seconds.items()},
        "rejected": {name: [part.rejected for part in parts] for name, parts in found.items()},
    }


def test_loading(benchmark, saved):
    """Seconds until a model has predicted one token, from its folder: packed, and the float model by transformers.

    Transformers maps files in the dtype asked for into memory and leaves reading to the first forward, so that this is
    the time that can be compared.
    """
    ids = torch.randint(1000, 40_000, (1, 8))

    def first(load):
        watch = Watch()
        with torch.no_grad(), loading.quiet():
            load()(input_ids=ids)
        return (watch.split(),)

    ways = {name: partial(first, partial(load_model, saved[name])) for name in ("int4", "w8a8", "int8")}
    ways |= {
        f"transformers, {str(dtype)[6:]}": partial(
            first, partial(AutoModelForCausalLM.from_pretrained, saved["float"], dtype=dtype)
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    found = {}
    benchmark.pedantic(lambda: found.update(in_turn(ways, 5)), rounds=1)
    started = time.perf_counter()
    model = load.read(saved["int4"], torch.float32)
    alone = time.perf_counter() - started
    baseline = quantforge.load(saved["int4"], torch.float32, packed=False)
    names = list(model.operators)
    share = load.linear_bytes(model.model, names) / load.linear_bytes(baseline, names)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "seconds": {name: part.seconds for name, (part,) in found.items()},
        "rejected": {name: part.rejected for name, (part,) in found.items()},
        "int4_load_seconds": alone,
        "int4_share_of_float32_memory": share,
    }


def load_model(folder):
    return load.read(folder, torch.float32).model
