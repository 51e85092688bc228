"""Optimizers: 8-bit states against bitsandbytes and 32 bits, pages against memory, and what is decayed."""

import copy
import gc
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from quantforge.errors import RecipeError, ResourceError
from quantforge.training import adam8, optimizers, paged
from quantforge.training.adam8 import CompactAdamW

LINUX = Path("/proc/self/maps").exists()


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_parameter(kind, **how):
    p = nn.Parameter(rows(96, 64))
    return p, kind([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, **how)


def run(p, optimizer, steps=5):
    """Take steps along gradients that differ from each other; return all values on the way."""
    found = []
    for step in range(steps):
        p.grad = rows(*p.shape, seed=step + 1) * 10.0**-step
        optimizer.step()
        found.append(p.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [256 * 40, 256 * 3 + 17, 100])
def test_codes_are_those_of_bitsandbytes_or_nearer(signed, size):
    """Its CPU kernel looks small numbers up coarsely, and misses the nearest value there; scales and values agree."""
    functional = pytest.importorskip("bitsandbytes").functional
    table = functional.create_dynamic_map(signed=signed)
    ours = adam8.signed_map() if signed else adam8.unsigned_map()
    assert torch.equal(ours.values, table)
    x = rows(size) if signed else rows(size).square()
    codes, state = functional.quantize_blockwise(x, code=table.clone(), blocksize=256)
    found, largest = adam8.to_codes(x, ours)
    assert torch.equal(largest, state.absmax)
    assert (found == codes).float().mean() > 0.95
    theirs, values = functional.dequantize_blockwise(codes, state), adam8.from_codes(found, largest, ours)
    assert torch.equal(adam8.from_codes(codes, largest, ours), theirs)
    other = found != codes
    assert ((values - x).abs() <= (theirs - x).abs() * 1.0001)[other].all()


@pytest.mark.parametrize("table", [adam8.signed_map(), adam8.unsigned_map()])
def test_codes_are_of_the_nearest_value(table):
    edges = (table.values[1:] + table.values[:-1]) / 2
    low = table.values[0].sign()
    x = torch.cat([edges, edges.nextafter(low - 1), edges.nextafter(low + 2), table.values, rows(4096).clamp(low, 1)])
    assert torch.equal(adam8._nearest(x, table), torch.bucketize(x, edges).to(torch.uint8))
    tiny = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1.0, -1.0]).clamp(min=low)
    assert torch.equal(adam8._nearest(tiny, table), torch.bucketize(tiny, edges).to(torch.uint8))


def test_a_block_of_nothing_stays_nothing():
    codes, largest = adam8.to_codes(torch.zeros(300), adam8.signed_map())
    assert adam8.from_codes(codes, largest, adam8.signed_map()).abs().max() == 0


def test_states_of_eight_bits_take_two_bytes_a_parameter():
    p, optimizer = one_parameter(CompactAdamW, bits=8)
    run(p, optimizer, 1)
    taken = sum(x.nbytes for x in optimizer.state[p].values())
    assert 2 * p.numel() < taken < 2.05 * p.numel()


def test_small_tensors_keep_states_of_32_bits():
    small, large = nn.Parameter(rows(4095)), nn.Parameter(rows(4096))
    optimizer = CompactAdamW([small, large])
    for p in (small, large):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert optimizer.state[large]["codes1"].dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 32])
def test_eight_bit_adam_reaches_what_adam_of_32_bits_does(bits):
    """The claim of arXiv:2110.02861, on a regression: the same loss within a few percent; without codes, exactly."""
    x, goal = rows(256, 96, seed=1), rows(256, 64, seed=2)

    def loss_after(make):
        torch.manual_seed(0)
        layer = nn.Linear(96, 64)
        optimizer = make(layer.parameters())
        for _ in range(150):
            loss = (layer(x) - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    usual = loss_after(lambda ps: torch.optim.AdamW(ps, lr=5e-3, weight_decay=0.01, fused=True))
    found = loss_after(lambda ps: CompactAdamW(ps, lr=5e-3, weight_decay=0.01, bits=bits))
    assert usual < 0.8
    assert found == (usual if bits == 32 else pytest.approx(usual, rel=0.02))


def test_second_moments_that_round_to_nothing_do_not_blow_a_step_up():
    """Beside a gradient of 0.5 in each block, those of 1e-3 are squares too small for a code, but first moments not."""

    def steps(bits):
        p = nn.Parameter(torch.zeros(256 * 64))
        optimizer, found = CompactAdamW([p], lr=1e-3, weight_decay=0.0, bits=bits), []
        for step in range(5):
            before = p.detach().clone()
            p.grad = rows(256 * 64) * 1e-3 if step == 0 else torch.zeros_like(p)
            p.grad[::256] = 0.5 if step == 0 else 0.0
            optimizer.step()
            found.append((p.detach() - before).abs())
        return torch.stack(found)

    usual, found = steps(32), steps(8)
    assert found.max() < 1.5 * usual.max()
    assert found[1:].mean() == pytest.approx(float(usual[1:].mean()), rel=0.3)


def test_chunks_change_nothing(monkeypatch):
    whole = run(*one_parameter(CompactAdamW))
    monkeypatch.setattr(adam8, "_CHUNK", 512)
    assert torch.equal(run(*one_parameter(CompactAdamW)), whole)


def test_parameters_of_half_precision_and_odd_layout_are_updated_in_place():
    torch.manual_seed(0)
    p = nn.Parameter(rows(64, 96).t().to(torch.bfloat16))
    assert not p.is_contiguous()
    before, optimizer = p.detach().clone(), CompactAdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach().float(), before.float() - 0.1, rtol=0.01, atol=0.01)
    assert p.dtype == torch.bfloat16


def test_pages_change_no_bit(tmp_path):
    usual = run(*one_parameter(torch.optim.AdamW, fused=True))
    assert torch.equal(run(*one_parameter(CompactAdamW, bits=32, pages=tmp_path)), usual)
    eight = run(*one_parameter(CompactAdamW, bits=8))
    assert torch.equal(run(*one_parameter(CompactAdamW, bits=8, pages=tmp_path)), eight)
    assert not torch.equal(eight, usual)


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_paged_states_lie_in_files_without_a_name_that_go_with_the_optimizer(tmp_path):
    def mapped():
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    p, optimizer = one_parameter(CompactAdamW, bits=32, pages=tmp_path)
    run(p, optimizer, 2)
    assert mapped() == 1
    assert not list(tmp_path.iterdir())
    open_files = [os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink() and os.path.lexists(f)]
    assert any(str(tmp_path) in name and name.endswith("(deleted)") for name in open_files)
    del optimizer
    gc.collect()
    assert mapped() == 0


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_after_a_step_paged_states_lie_no_longer_in_memory(tmp_path):
    def resident():
        status = Path("/proc/self/status").read_text()
        return sum(int(n) for n in re.findall(r"Rss(?:File|Shmem):\s+(\d+) kB", status)) * 1024

    p = nn.Parameter(torch.zeros(4_000_000))
    optimizer = CompactAdamW([p], bits=32, pages=tmp_path)
    p.grad = torch.ones_like(p)
    before = resident()
    optimizer.step()
    assert sum(x.nbytes for x in optimizer.state[p].values()) > 32_000_000
    assert resident() - before < 4_000_000
    assert optimizer.state[p]["exp_avg"].min() > 0
    assert resident() - before > 15_000_000


def test_a_disk_without_room_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(paged.os, "posix_fallocate", full)
    p, optimizer = one_parameter(CompactAdamW, bits=32, pages=tmp_path)
    with pytest.raises(ResourceError, match=r"QF-540.* cannot hold 49,152 bytes of optimizer states: No space left"):
        run(p, optimizer, 1)
    p, optimizer = one_parameter(CompactAdamW, pages=tmp_path / "missing")
    with pytest.raises(ResourceError, match="No such file or directory"):
        run(p, optimizer, 1)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_state_dict_is_plain_tensors_and_goes_on_bit_for_bit(tmp_path, bits, paged):
    how = {"bits": bits, "pages": tmp_path if paged else None}
    p, optimizer = one_parameter(CompactAdamW, **how)
    run(p, optimizer, 3)
    kept, values = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    assert all(type(x) is torch.Tensor for state in kept["state"].values() for x in state.values())
    after = run(p, optimizer)
    other, fresh = one_parameter(CompactAdamW, **how)
    with torch.no_grad():
        other.copy_(values)
    fresh.load_state_dict(kept)
    assert torch.equal(run(other, fresh), after)
    assert (other in fresh._pages) == paged


def test_what_is_decayed():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    decayed = {"a.q_proj.weight", "a.q_proj.latent", "a.lora_A.default.weight", "embed_tokens.weight"}
    names = {*decayed, "a.q_proj.scale", "a.q_proj.zero_point", "a.q_proj.left_scale"}
    assert {name for name in names if optimizers.is_decayed(name, matrix)} == decayed
    assert not any(optimizers.is_decayed(name, vector) for name in ("norm.weight", "q_proj.bias"))


def test_learning_rates_by_name_and_decay_of_matrices_alone():
    named = {
        "a.weight": nn.Parameter(torch.ones(2, 2)),
        "a.bias": nn.Parameter(torch.ones(2)),
        "b": nn.Parameter(torch.ones(2, 2)),
    }
    made = optimizers.make(
        "adamw", named, betas=(0.9, 0.9), weight_decay=0.5, lr_of=lambda name: 0.1 if name == "b" else 1.0
    )
    optimizers.set_rate(made, 0.2)
    for p in named.values():
        p.grad = torch.zeros_like(p)
    made.step()
    assert named["a.weight"].detach().unique().tolist() == pytest.approx([1 - 0.2 * 0.5])
    assert named["b"].detach().unique().tolist() == pytest.approx([1 - 0.02 * 0.5])
    assert named["a.bias"].detach().unique().tolist() == [1]


@pytest.mark.parametrize(
    ("name", "kind", "bits", "pages"),
    [
        ("adamw", torch.optim.AdamW, None, False),
        ("adamw8bit", CompactAdamW, 8, False),
        ("paged-adamw", CompactAdamW, 32, True),
        ("paged-adamw8bit", CompactAdamW, 8, True),
    ],
)
def test_optimizers_by_name(tmp_path, name, kind, bits, pages):
    assert name in optimizers.OPTIMIZERS
    made = optimizers.make(name, {"w": nn.Parameter(rows(80, 80))}, betas=(0.9, 0.99), weight_decay=0.0, pages=tmp_path)
    assert type(made) is kind
    if bits:
        assert (made._bits, made._folder) == (bits, tmp_path if pages else None)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'adamw'"):
        optimizers.make("adam", {}, betas=(0.9, 0.99), weight_decay=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw8bit", "paged-adamw", "paged-adamw8bit"])
def test_on_cuda_the_optimizers_are_those_of_bitsandbytes(name):
    library = pytest.importorskip("bitsandbytes").optim
    kinds = {"adamw8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw8bit": "PagedAdamW8bit"}

    def one():
        p = nn.Parameter(rows(512, 512).cuda())
        made = optimizers.make(name, {"w": p}, betas=(0.9, 0.99), weight_decay=0.1)
        optimizers.set_rate(made, 1e-3)
        return p, made

    p, made = one()
    assert type(made) is getattr(library, kinds[name])
    run_on_cuda(p, made, 3)
    other, fresh = one()
    kept = {key: x.clone() for key, x in optimizers.states(made, p).items()}
    with torch.no_grad():
        other.copy_(p)
    optimizers.restore(fresh, {other: kept})
    torch.testing.assert_close(run_on_cuda(other, fresh, 3), run_on_cuda(p, made, 3), rtol=0, atol=0)


def run_on_cuda(p, optimizer, steps):
    for step in range(steps):
        p.grad = rows(*p.shape, seed=step + 1).cuda()
        optimizer.step()
    return p.detach().clone()
