"""What is foretold of a run: sizes to the byte, memory and disk that are refused before any work, sizes as text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import quantforge
from quantforge import api, cli, exporters, preflight, recipe
from quantforge.cli.options import parse_size
from quantforge.errors import RecipeError, ResourceError
from quantforge.models import arch, load, tiny
from quantforge.models.kvcache import KVCache, parse_kv
from quantforge.preflight import output, rehearsal, serving
from quantforge.preflight.strategies import Strategy

TINY = Path(__file__).parent / "data" / "tiny-llama"
IDS = torch.arange(256).view(8, 32) % 100 + 5


def planned(method="rtn", container=None, **wishes):
    source = load.find(str(TINY))
    fix = None if container is None else exporters.named(container).fix
    chosen = recipe.load(method, fix=fix, **wishes)
    return source, api.lay(source.skeleton(), chosen, source.dtype, format=container, export=True)


def saved(tmp_path, method, container, **wishes):
    """Quantize for real; return the bytes of the files of weights."""
    quantforge.quantize(TINY, method, calibration=IDS, out=tmp_path / "out", format=container, **wishes)
    return sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.suffix in (".safetensors", ".gguf"))


@pytest.mark.parametrize(
    ("method", "container", "wishes"),
    [
        ("rtn", None, {}),
        ("rtn", "gptq", {}),
        ("rtn", "awq", {}),
        ("rtn", "native", {"bits": 3}),
        ("rtn", "gguf", {"bits": 8}),
        ("rtn", "bitsandbytes", {"weights": "nf4"}),
        ("rtn", None, {"weights": "nvfp4"}),
        ("rtn", None, {"weights": "int8-channel-sym", "inputs": "int8-tensor-static"}),
        ("lorc", None, {}),
        ("lorc", "native", {}),
        ("hqq", None, {}),
    ],
)
def test_the_weights_have_the_bytes_that_were_foretold(method, container, wishes, tmp_path):
    source, plan = planned(method, container, **wishes)
    found = output.size(plan, source.skeleton(), load.tokenizer(source))
    assert found.open == ""
    assert found.weights == saved(tmp_path, method, container, **wishes)


def test_what_only_data_tell_is_a_least_and_says_so(tmp_path):
    source, plan = planned("spqr")
    found = output.size(plan, source.skeleton())
    assert "beside its codes" in found.open
    assert found.weights < saved(tmp_path, "spqr", None)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("tokens", [3, 40, 100])
def test_caches_have_the_bytes_that_were_foretold(kind, tokens):
    model = tiny.make(kind)
    found = serving.caches(model.config, tokens, torch.float32)
    for name in serving.FORMATS:
        cache = KVCache(parse_kv(name), model.config)
        with torch.no_grad():
            model(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert found[name] == cache.nbytes


def test_a_float_cache_follows_the_formula():
    config = tiny.make("llama").config
    assert next(iter(serving.caches(config, 1000, torch.bfloat16).items())) == ("bf16", 2 * 2 * 2 * 16 * 2 * 1000)


def test_a_rehearsed_forward_holds_what_a_real_one_holds():
    model, seen = tiny.make("llama"), []
    found, live = rehearsal.forward(model.config, 2, 32), rehearsal.Live()
    for module in model.modules():
        if arch.is_linear(module):
            module.register_forward_pre_hook(lambda module, args: seen.append(live.now()))
    live.own = frozenset(p.untyped_storage()._cdata for p in model.parameters())
    with torch.no_grad(), live:
        model.base_model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False)
    assert found.parked == pytest.approx(max(seen) / 64, rel=0.1)


def test_more_tokens_take_more_memory_disk_and_time_where_data_are_needed():
    source, plan = planned("gptq")
    small, large = (preflight.estimate(plan, source, samples=n, seq_len=64, max_memory=10**12) for n in (8, 8000))
    assert large.memory > small.memory + 7992 * 64 * 64 * 4
    assert large.disk > small.disk
    assert large.took.work > small.took.work
    assert small.strategy == large.strategy == Strategy()


def test_the_global_random_state_is_left_alone():
    source, plan = planned("gptq")
    before = torch.get_rng_state()
    preflight.estimate(plan, source, samples=2, seq_len=16)
    assert torch.equal(before, torch.get_rng_state())


def test_a_quick_estimate_chooses_what_a_thorough_one_does():
    source, plan = planned("gptq")
    for budget in (10**12, 10**9):
        quick, thorough = (
            preflight.estimate(plan, source, samples=9000, seq_len=64, max_memory=budget, quick=q)
            for q in (True, False)
        )
        assert quick.strategy == thorough.strategy
        assert quick.memory >= thorough.memory * 0.99


def test_a_tight_budget_streams_then_replays_then_is_refused():
    source, plan = planned("gptq")
    wide = preflight.estimate(plan, source, samples=20_000, seq_len=64, max_memory=10**12)
    tight = preflight.estimate(plan, source, samples=20_000, seq_len=64, max_memory=wide.memory // 2)
    assert tight.strategy.stream
    assert tight.strategy.replay
    assert tight.memory < wide.memory
    preflight.check_memory(replace(tight, budget=tight.memory), plan)
    with pytest.raises(ResourceError, match=r"--max-memory is 1\.0 MB: \d+\.\dGB would fit") as caught:
        preflight.choose(plan, source, 8 * 64, 10**6, seq_len=64)
    assert caught.value.exit_code == 5


def test_a_disk_that_is_too_small_is_refused_before_work(tmp_path, monkeypatch):
    source, plan = planned("rtn")
    found = preflight.estimate(plan, source, samples=1, seq_len=8)
    free = type("Usage", (), {"free": found.total_disk})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: free)
    preflight.check_disk(found, tmp_path / "new" / "out")
    free.free -= 1
    with pytest.raises(ResourceError, match="of disk"):
        preflight.check_disk(found, tmp_path / "new" / "out")


def dry(*arguments):
    return CliRunner().invoke(cli.main, ["quantize", str(TINY), "-m", "rtn", "--dry-run", *map(str, arguments)])


def test_a_dry_run_prints_what_the_run_and_serving_take():
    done = dry("--context", 100)
    assert done.exit_code == 0, done.stderr
    for word in ("bytes of weights", "memory:", "disk:", "time:", "serving with 100 tokens", "int4-kivi-g32-w32"):
        assert word in done.stdout
    record = json.loads(dry("--context", 100, "--json").stdout)
    assert record["estimate"]["output"]["exact"] is True
    assert record["serving"]["weights"] == record["estimate"]["output"]["weights"]


def test_a_probe_tells_the_time_by_one_block():
    record = json.loads(dry("--probe", "--json").stdout)
    assert record["estimate"]["probed_seconds"] > 0


def test_a_dry_run_that_will_not_fit_ends_with_5():
    done = dry("--max-memory", "1MB")
    assert (done.exit_code, done.stdout) == (5, "")
    assert done.stderr.startswith("error[QF-550]: ")


@pytest.mark.parametrize("option", [("--probe",), ("--context", "5")])
def test_what_belongs_to_a_dry_run_is_refused_without_it(option, tmp_path):
    done = CliRunner().invoke(cli.main, ["quantize", str(TINY), "-m", "rtn", "-o", str(tmp_path / "out"), *option])
    assert done.exit_code == 2
    assert option[0] in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("500MiB", 500 * 2**20), ("2.5g", 25 * 10**8), ("1024", 1024), ("3 TiB", 3 * 2**40)],
)
def test_sizes_are_read(text, size):
    assert parse_size("--max-memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 gigs", "-1GB", "0", "1e3", "8iB", "nan", "9" * 400, "٨GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="--max-memory"):
        parse_size("--max-memory", text)


def test_a_text_that_takes_too_much_memory_is_refused_and_named(tmp_path, monkeypatch):
    text = tmp_path / "long.txt"
    text.write_text("word " * 4000)
    common = ("quantize", TINY, "-m", "gptq", "--group-size", 32, "--samples", 2, "--seq-len", 64, "--calib", text)
    monkeypatch.setattr("quantforge.api.corpus.memory", lambda text: 10**13)
    told = CliRunner().invoke(cli.main, [str(a) for a in (*common, "--out", tmp_path / "out")])
    assert told.exit_code == 5
    assert f"error[QF-553]: to tokenize '{text}' takes 1000" in told.stderr
    told = CliRunner().invoke(cli.main, [str(a) for a in (*common, "--max-memory", "2GB", "--out", tmp_path / "out")])
    assert "2.0 GB is --max-memory: use a shorter text." in told.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["long.txt"]


def test_a_dry_run_counts_the_vocabulary_that_gguf_holds(tmp_path):
    common = ("quantize", TINY, "-m", "rtn", "--bits", 4, "--format", "gguf", "--out", tmp_path / "out", "--json")
    foretold = json.loads(CliRunner().invoke(cli.main, [str(a) for a in (*common, "--dry-run")]).stdout)
    assert foretold["estimate"]["output"]["exact"]
    assert CliRunner().invoke(cli.main, [str(a) for a in common]).exit_code == 0
    assert (tmp_path / "out" / "model.gguf").stat().st_size == foretold["estimate"]["output"]["weights"]
