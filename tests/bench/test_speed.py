"""Speed and memory on the demo model: `make bench`. Figures, never thresholds."""

import os
import time
from dataclasses import replace

import pytest
import torch

from quantforge import api, pipeline, recipe
from quantforge import plan as planning
from quantforge.evaluation import perplexity
from quantforge.models import load
from quantforge.numerics.formats import parse
from quantforge.numerics.problem import Problem
from quantforge.result import Result
from quantforge.solvers.gptq import GPTQ

pytestmark = pytest.mark.bench

# Floating-point operations of GPTQ on SmolLM2-135M and 64 x 512 tokens: forward, the upper triangle of shared Hessians
# by eight tiles, one Cholesky factorization an input, the solve.
ARITHMETIC = 11.3e12


@pytest.fixture(scope="module", autouse=True)
def every_core():
    """Use all cores, as the command line does; the other tests use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def gemm_rate() -> float:
    """Multiply-adds a second, times two, of a float32 product of the model's own shape, the median of 15."""
    a, b = torch.randn(2048, 576), torch.randn(1536, 576)
    times = []
    for _ in range(18):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 2048 * 576 * 1536 / sorted(times[3:])[7]


@pytest.fixture(scope="module")
def demo():
    source = load.find(None)
    tokenizer = load.tokenizer(source)
    ids, _ = api.token_ids(
        "python-docs", "calibration", tokenizer=tokenizer, config=source.config, seq_len=512, count=64
    )
    return source, ids


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [4, 3])
def test_whole_model(benchmark, demo, method, bits):
    """Seconds from the first forward to the last solve, and the share of them that is arithmetic at the GEMM's rate."""
    source, ids = demo
    model = load.model(source)
    plan = planning.make(model, recipe.load(method, bits=bits, group_size=64), source.dtype)
    before = gemm_rate()
    needed = ids if plan.needs else None
    result = benchmark.pedantic(
        lambda: api.run(model, plan, needed, tokenizer=None, source="", calibration={}), rounds=1
    )
    after = gemm_rate()
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "gemm_gflops_before": before / 1e9,
        "gemm_gflops_after": after / 1e9,
        "seconds": result.seconds,
        "peak_memory_mb": (result.peak_memory or 0) / 1e6,
    }
    if method == "gptq":
        benchmark.extra_info["efficiency"] = ARITHMETIC / ((before + after) / 2) / result.seconds


@pytest.fixture(scope="module")
def gptq_seconds(demo) -> float:
    """Seconds of GPTQ at 3 bits, beside which the other methods are timed."""
    return seconds_of(demo, "gptq", {"bits": 3})


def seconds_of(demo, method: str, options: dict[str, object]) -> float:
    source, ids = demo
    model = load.model(source)
    plan = planning.make(model, recipe.load(method, **options), source.dtype)
    start = time.perf_counter()
    pipeline.quantize(model, plan, ids if plan.needs else None)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"bits": 3}),
        ("spqr", {}),
        ("gptq+lorc", {"bits": 3}),
        ("nf4", {}),
        ("hqq", {"bits": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_methods_beside_gptq(benchmark, demo, gptq_seconds, method, options):
    """Seconds of a method on the whole model, as a multiple of a GPTQ run in the same process."""
    time_beside(benchmark, demo, method, options, gptq_seconds)


@pytest.mark.parametrize("method", ["smoothquant", "llm-int8", "zeroquant"])
def test_activation_methods_beside_gptq(benchmark, demo, method):
    """The same of methods that round inputs, each with a GPTQ run just before it: the machine's speed drifts."""
    time_beside(benchmark, demo, method, {}, seconds_of(demo, "gptq", {"bits": 3}))


def time_beside(benchmark, demo, method: str, options: dict[str, object], gptq_seconds: float) -> None:
    taken = []
    benchmark.pedantic(lambda: taken.append(seconds_of(demo, method, options)), rounds=1)
    ratio = taken[0] / gptq_seconds
    threads = torch.get_num_threads()
    benchmark.extra_info |= {"threads": threads, "seconds": taken[0], "gptq_seconds": gptq_seconds, "ratio": ratio}


def test_activation_evaluation_beside_float(benchmark, demo):
    """Seconds to score eight windows with 8-bit weights and inputs, as a multiple of the float model's."""
    source, ids = demo
    model = load.model(source)
    start = time.perf_counter()
    perplexity.evaluate(model, ids[:8])
    level = time.perf_counter() - start
    made = recipe.load("rtn", bits=8, group_size=-1, symmetric=True, inputs="int8-token")
    pipeline.quantize(model, planning.make(model, made, source.dtype))
    taken = []

    def run() -> None:
        begin = time.perf_counter()
        perplexity.evaluate(model, ids[:8])
        taken.append(time.perf_counter() - begin)

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= {"seconds": taken[0], "float_seconds": level, "times_float": taken[0] / level}


def test_divergence_added_to_perplexity(benchmark, demo):
    """Seconds to score 48 windows with the divergence from the float model, beside those without it."""
    source, _ = demo
    windows = {"tokenizer": load.tokenizer(source), "config": source.config, "seq_len": 512, "count": 48}
    ids, _ = api.token_ids("python-docs", "evaluation", **windows)
    model = load.model(source)
    reference, _ = perplexity.make_reference(model, ids)
    pipeline.quantize(model, planning.make(model, recipe.load("rtn", bits=4, group_size=64), source.dtype))
    ways = {"without": None, "bound": replace(reference, dense=None), "bound_and_gap": reference}
    seconds: dict[str, list[float]] = {name: [] for name in ways}

    def run() -> None:
        for name, kept in ways.items():
            begin = time.perf_counter()
            perplexity.evaluate(model, ids, kept)
            seconds[name].append(time.perf_counter() - begin)

    benchmark.pedantic(run, rounds=3)
    level = min(seconds["without"])
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "seconds": seconds} | {
        f"{name}_times_perplexity": min(seconds[name]) / level for name in ("bound", "bound_and_gap")
    }


def test_training_steps_of_students(benchmark, demo):
    """Seconds of an optimizer step of students at 3 bits, as multiples of one of plain fine-tuning; the best of 6."""
    from quantforge.training import qlora, recover
    from quantforge.training.loop import Settings, train
    from quantforge.training.steps import language_model

    source, ids = demo
    made = recipe.load("rtn", bits=3, group_size=64)

    def quantized() -> Result:
        model = load.model(source)
        plan = planning.make(model, made, source.dtype)
        return api.run(model, plan, None, tokenizer=None, source="", calibration={})

    students = {
        "plain": load.model(source).requires_grad_(True),
        "scales, norms": recover.open_student(quantized()),
        "weights, scales, norms": recover.open_student(quantized(), ("weights", "scales", "norms")),
        "adapters of rank 64": qlora.open_student(quantized(), qlora.Adapters()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in students}

    def run() -> None:
        for name, student in students.items():
            seconds[name] += train(student, ids, language_model(), Settings(steps=3, batch_size=2, lr=1e-6)).seconds

    benchmark.pedantic(run, rounds=2)
    best = {name: min(found) for name, found in seconds.items()}
    times = {name: found / best["plain"] for name, found in best.items()}
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "seconds": best, "times_plain": times}


@pytest.mark.parametrize("width", [576, 1536, 2048])
def test_one_layer(benchmark, width):
    """Seconds to solve one square layer in 4 bits, groups of 64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * width, width, generator=generator)
    problem = Problem("layer", torch.randn(width, width, generator=generator), parse("int4-g64-asym"), x.T @ x / len(x))
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(GPTQ().solve, args=(problem,), rounds=3, warmup_rounds=1)


def test_the_walk_alone(benchmark, demo):
    """Seconds of forward and Hessians without any solving."""
    from quantforge.calibrate.stats import Hessian
    from quantforge.models import arch
    from quantforge.models.walk import walk

    source, ids = demo
    model = load.model(source)
    stages = arch.find_stages(model)[0]

    def run() -> None:
        hessians: dict[int, Hessian] = {}

        def observe(index: int, batch: int, x: torch.Tensor) -> None:
            hessians.setdefault(index, Hessian(x.shape[-1])).add(x)

        batches = torch.split(ids, pipeline.BATCH_TOKENS // ids.shape[1])
        for index in walk(lambda batch: model.base_model(input_ids=batch, use_cache=False), batches, stages, observe):
            hessians.pop(index)

    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(run, rounds=1)
