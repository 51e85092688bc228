"""The quantized KV cache: what it holds, that nothing but the tokens decides it, and that attention reads it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, DynamicCache

from quantforge.errors import ModelError
from quantforge.models import tiny
from quantforge.models.kvcache import KVCache, KVFormat, KVLayer, parse_kv
from quantforge.numerics.packing import pack

NOTATIONS = (
    "int8-token",
    "int4-token-g4-asym",
    "int2-token-g8-w5-s3",
    "int4-kivi-g4-w8",
    "int2-kivi-g3-w6-s2",
    "int8-kivi-g4-w4-s0-sym-fp32",
    "int4-kivi-g1-w1-s1-bf16",
)
WIDTH = 10  # which neither 4 nor 8 nor a byte of two bits divides
LEVELS = {2: 3, 4: 15, 8: 255}


def drawn(tokens: int, seed: int = 0, batch: int = 2, heads: int = 2, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Return keys and values whose magnitudes differ from channel to channel and from token to token."""
    rng = torch.Generator().manual_seed(seed)
    shape = (2, batch, heads, tokens, width)
    size = torch.randn(2, batch, heads, tokens, 1, generator=rng) + torch.randn(2, 1, heads, 1, width, generator=rng)
    keys, values = torch.randn(shape, generator=rng) * size.exp()
    return keys, values


def filled(fmt: KVFormat, keys: Tensor, values: Tensor, cuts: list[int] | None = None) -> KVLayer:
    """Return a layer that was given the tokens in calls of `cuts`; all in one call without."""
    layer = KVLayer(fmt)
    sizes = cuts or [keys.shape[2]]
    for k, v in zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True):
        layer.update(k, v)
    return layer


def held(layer: KVLayer) -> list[Tensor]:
    return [x for stream in layer.streams for x in stream.tensors()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def ids(batch: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, tokens: Tensor, cache, cuts: list[int]) -> Tensor:
    """Return the logits of `tokens` [batch, length] given through the cache in calls of `cuts`."""
    with torch.no_grad():
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(cuts, 1)]
    return torch.cat(parts, 1)


# ---- what is held


@pytest.mark.parametrize("text", NOTATIONS)
@settings(max_examples=12)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=9), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_held_does_not_depend_on_how_the_stream_is_cut(text, cuts, dtype):
    fmt, tokens = parse_kv(text), sum(cuts)
    keys, values = (x.to(dtype) for x in drawn(tokens, tokens))
    whole = filled(fmt, keys, values)
    for other in (cuts, [1] * tokens):
        layer = filled(fmt, keys, values, other)
        assert layer.get_seq_length() == tokens
        assert same(held(layer), held(whole))
        assert same([s.read() for s in layer.streams], [s.read() for s in whole.streams])


@pytest.mark.parametrize("text", NOTATIONS)
@given(tokens=st.integers(1, 30))
def test_a_window_as_long_as_the_stream_is_exact(text, tokens):
    fmt = parse_kv(text)
    rest = max(tokens - fmt.sinks, 0)
    step = fmt.group if fmt.keys == "channel" else 1
    keys, values = drawn(tokens)
    exact = filled(replace(fmt, window=max(-(-rest // step), 1) * step), keys, values, [1] * tokens)
    assert same([s.read() for s in exact.streams], [keys, values])


def allowed(x: Tensor, fmt: KVFormat, axis: int, group: int) -> Tensor:
    """Return half a step for each value: of the range of its group of `group` along `axis`, in float64."""
    eps = torch.finfo(fmt.scale).eps
    half = torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.shape[axis], group):
        part = x.double().narrow(axis, i, min(group, x.shape[axis] - i))
        low, high = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
        span = 2 * torch.maximum(low.abs(), high.abs()) if fmt.symmetric else high - low
        step = (span / LEVELS[fmt.bits]).clamp(min=torch.finfo(fmt.scale).tiny)
        rounded = eps * (span + 2 * torch.maximum(low.abs(), high.abs()))  # of the scale and of the zero point
        half.narrow(axis, i, part.shape[axis]).copy_((0.5 * step + rounded).expand_as(part))
    return half


@pytest.mark.parametrize("text", NOTATIONS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 29, 40])
def test_each_value_errs_by_half_a_step_of_its_own_group_and_first_and_latest_tokens_by_nothing(text, tokens):
    fmt = parse_kv(text)
    keys, values = drawn(tokens)
    for stream, x, by_channel in zip(
        filled(fmt, keys, values).streams, (keys, values), (fmt.keys == "channel", False), strict=True
    ):
        unit = fmt.group if by_channel else 1
        start = min(fmt.sinks, tokens)
        stop = start + max(tokens - start - fmt.window, 0) // unit * unit
        out = stream.read()
        assert torch.equal(out[:, :, :start], x[:, :, :start])
        assert torch.equal(out[:, :, stop:], x[:, :, stop:])
        assert stream.codes.shape[2] == stop - start
        if stop == start:
            continue
        stored = x[:, :, start:stop]
        half = allowed(stored, fmt, 2 if by_channel else 3, fmt.group or WIDTH)
        error = (out[:, :, start:stop].double() - stored.double()).abs()
        assert bool((error <= half).all())
        if fmt.group != 1:
            assert float((error / half).max()) > 0.5  # the bound is that of rounding, not some wide one


@pytest.mark.parametrize("text", NOTATIONS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 6e4, 1e-6])
def test_groups_of_one_value_and_extreme_ones_stay_finite_and_close(text, value):
    fmt, x = parse_kv(text), torch.full((1, 2, 30, WIDTH), value)
    rounding = (
        1 / LEVELS[fmt.bits] if fmt.symmetric else 0
    )  # the largest value of a symmetric group errs by half a step
    for stream in filled(fmt, x, x).streams:
        torch.testing.assert_close(stream.read(), x, rtol=rounding + 0.01, atol=1e-4)


@given(bits=st.sampled_from([2, 4, 8]), width=st.integers(1, 17), seed=st.integers(0, 99))
def test_a_row_of_codes_is_packed_as_the_stream_of_bits_that_files_hold(bits, width, seed):
    keys, values = drawn(3, seed, width=width)
    fmt = KVFormat(bits, group=8)
    stream = filled(fmt, keys, values).streams[0]
    step = stream.scale.repeat_interleave(8, 3)[..., :width].float()
    codes = (keys / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
    rows = [pack(row, bits) for row in codes.to(torch.uint8).flatten(0, 2)]
    assert torch.equal(stream.codes.flatten(0, 2), torch.stack(rows))


@pytest.mark.parametrize("text", NOTATIONS)
def test_items_of_a_batch_do_not_influence_each_other(text):
    keys, values = drawn(30, batch=3)
    together = held(filled(parse_kv(text), keys, values))
    for i in range(3):
        alone = held(filled(parse_kv(text), keys[i : i + 1], values[i : i + 1]))
        assert same(alone, [x[i : i + 1] for x in together])


@pytest.mark.parametrize("text", NOTATIONS)
def test_batches_are_reordered_chosen_and_repeated_as_their_tokens_would_be(text):
    keys, values = drawn(30, batch=3)
    order = torch.tensor([2, 0, 0])
    for change, name, argument in (
        (lambda x: x[order], "reorder_cache", order),
        (lambda x: x[order[:2]], "batch_select_indices", order[:2]),
        (lambda x: x.repeat_interleave(2, 0), "batch_repeat_interleave", 2),
    ):
        layer = filled(parse_kv(text), keys[:, :, :20], values[:, :, :20])
        getattr(layer, name)(argument)
        layer.update(change(keys)[:, :, 20:], change(values)[:, :, 20:])
        assert same(held(layer), held(filled(parse_kv(text), change(keys), change(values))))


def test_a_layer_that_was_reset_is_as_new_and_tokens_cannot_be_taken_back():
    fmt = parse_kv("int4-kivi-g4-w8")
    keys, values = drawn(30)
    layer = filled(fmt, *drawn(25, seed=1))
    layer.crop(0)
    with pytest.raises(ValueError, match=r"^a KV cache in int4-kivi-g4-w8 cannot take 3 tokens back$"):
        layer.crop(-3)
    layer.reset()
    assert (layer.get_seq_length(), held(layer)) == (0, [])
    layer.update(keys, values)
    assert same(held(layer), held(filled(fmt, keys, values)))


@pytest.mark.parametrize("seed", range(3))
def test_keys_with_wide_channels_lose_less_by_channel_than_by_token(seed):
    """KIVI, section 3.2: a few channels of keys are wide for all tokens, and spoil the scale of every token."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 2, 160, 64, generator=rng)
    keys[..., [5, 40]] = keys[..., [5, 40]] * 2 + 20
    queries = torch.randn(2, 2, 8, 64, generator=rng)
    lost = {}
    for text in ("int4-kivi-g32-w32", "int4-token-g32-w32-s4-asym"):
        layer = filled(parse_kv(text), keys, keys)
        lost[text] = float((queries @ (layer.streams[0].read() - keys).mT).square().mean())
    assert lost["int4-kivi-g32-w32"] < 0.3 * lost["int4-token-g32-w32-s4-asym"]


# ---- bytes


def counted(fmt: KVFormat, tokens: int, rows: int, width: int, size: int) -> int:
    """Return the bytes of one layer by the definition; `rows` is batch times heads, `size` the bytes of a float."""
    first = min(fmt.sinks, tokens)
    total = 0
    for by_channel in (fmt.keys == "channel", False):
        unit = fmt.group if by_channel else 1
        stored = max(tokens - first - fmt.window, 0) // unit * unit
        groups = stored // unit * width if by_channel else stored * -(-width // (fmt.group or width))
        total += (tokens - stored) * width * size + stored * -(-width * fmt.bits // 8)
        total += groups * fmt.scale.itemsize * (1 if fmt.symmetric else 2)
    return rows * total


@pytest.mark.parametrize("text", NOTATIONS)
@pytest.mark.parametrize("tokens", [2, 13, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_codes_scales_zero_points_and_floats(text, tokens, dtype):
    """Keys and values are views into much larger storages, as those of a fused projection are."""
    fused = torch.randn(2, tokens, 6, 3 * WIDTH).to(dtype).transpose(1, 2)
    keys, values = fused[:, :2, :, :WIDTH], fused[:, 4:, :, WIDTH : 2 * WIDTH]
    config = tiny.make("llama").config
    for cuts in ([tokens], [1] * tokens, [tokens - 1, 1]):
        cache = KVCache(parse_kv(text), config)
        for layer in range(2):
            for k, v in zip(keys.split(cuts, 2), values.split(cuts, 2), strict=True):
                cache.update(k, v, layer)
        assert cache.nbytes == 2 * counted(parse_kv(text), tokens, 4, WIDTH, dtype.itemsize)


def test_bytes_fall_with_the_bits():
    keys, values = drawn(200, width=64)
    sizes = []
    for text in ("int8-kivi", "int4-kivi", "int2-kivi"):
        cache = KVCache(parse_kv(text), tiny.make("llama").config)
        cache.update(keys, values, 0)
        sizes.append(cache.nbytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 0.6 * (keys.nbytes + values.nbytes)


# ---- through models


@pytest.mark.parametrize("kind", [*tiny.names(), "mixtral"])
@pytest.mark.parametrize("text", ["int4-token-w64", "int2-kivi-g8-w64"])
def test_a_window_that_holds_everything_gives_the_logits_of_the_float_cache(kind, text):
    """Forty tokens, which is more than the sliding windows of 32; the cache itself holds all of them."""
    model, tokens, cuts = tiny.make(kind), ids(), [17, *[1] * 10, 13]
    ours = run(model, tokens, KVCache(parse_kv(text), model.config), cuts)
    assert torch.equal(ours, run(model, tokens, DynamicCache(), cuts))
    with torch.no_grad():
        torch.testing.assert_close(ours, model(tokens, use_cache=False).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("text", ["int8-token", "int4-token-g8-asym-fp32"])
def test_without_a_window_tokens_one_by_one_are_all_tokens_at_once(kind, text):
    model = tiny.make(kind, dtype=torch.float64)  # so that no code flips by how sums are ordered
    logits = [
        run(model, ids(), KVCache(parse_kv(text), model.config), cuts) for cuts in ([40], [1] * 40, [7, 1, 30, 2])
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "opt"])
def test_logits_err_less_the_more_bits_there_are(kind):
    model = tiny.make(kind)
    exact = run(model, ids(), DynamicCache(), [1] * 40).log_softmax(-1)
    divergence = []
    for bits in (8, 4, 2):
        fmt = parse_kv(f"int{bits}-kivi-g8-w8")
        logits = run(model, ids(), KVCache(fmt, model.config), [1] * 40).log_softmax(-1)
        divergence.append(float((exact.exp() * (exact - logits)).sum(-1).mean()))
    assert 0 < divergence[0] < divergence[1] / 10 < divergence[2] / 40
    assert divergence[0] < 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("part", ["first", "codes", "scale", "zero", "recent"])
@pytest.mark.parametrize("which", [0, 1])
def test_noise_in_any_part_of_the_cache_changes_the_logits(kind, part, which):
    model, tokens, rng = tiny.make(kind), ids(), torch.Generator().manual_seed(1)
    logits = []
    for noisy in (False, True):
        cache = KVCache(parse_kv("int4-kivi-g8-w8"), model.config)
        run(model, tokens[:, :39], cache, [39])
        if noisy:
            x = getattr(cache.layers[1].streams[which], part)
            noise = torch.rand(x.shape, generator=rng)
            x.copy_(noise * 256 if part == "codes" else noise * 4)
        logits.append(run(model, tokens[:, 39:], cache, [1]))
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("beams", [1, 3])
def test_text_is_generated_through_it(beams):
    model = tiny.make("llama")
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    wide = KVCache(parse_kv("int4-kivi-g32-w64"), model.config)
    ours = model.generate(ids(), past_key_values=wide, **settings)
    assert torch.equal(ours, model.generate(ids(), **settings))
    narrow = KVCache(parse_kv("int2-token"), model.config)
    assert not torch.equal(ours, model.generate(ids(), past_key_values=narrow, **settings))


# ---- notation and errors


@given(
    fmt=st.builds(
        KVFormat,
        st.sampled_from([2, 4, 8]),
        group=st.none() | st.integers(1, 300),
        window=st.integers(0, 300),
        sinks=st.integers(0, 9),
        symmetric=st.booleans(),
        scale=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    ),
    times=st.integers(1, 3),
)
def test_every_format_is_read_from_what_it_is_written_as(fmt, times):
    assert parse_kv(str(fmt)) == fmt
    if fmt.group:
        kivi = replace(fmt, keys="channel", window=times * fmt.group)
        assert parse_kv(str(kivi)) == kivi


def test_what_is_left_out_of_a_notation():
    assert parse_kv("int8-token") == KVFormat(8)
    assert parse_kv("int4-kivi") == KVFormat(4, "channel", 32, 32, 4, symmetric=False)
    assert parse_kv("int4-kivi-g64").window == 64
    assert str(parse_kv("int4-kivi-g32-w32-s4-asym-fp16")) == "int4-kivi-g32-w32"


@pytest.mark.parametrize(
    "text",
    ["", "int8", "kivi", "int4-channel", "int4-kivi-w32-g32", "int4-kivi-g0", "int16-token", "nf4-token", "int4-kivi-"],
)
def test_what_is_no_notation_is_named_with_some_that_are(text):
    with pytest.raises(ValueError, match=rf"^{re.escape(repr(text))} is no format of a KV cache; write for example "):
        parse_kv(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3-token", "a KV cache has 2, 4 or 8 bits, not 3"),
        ("int4-kivi-g32-w16", "a window of 16 tokens is shorter than the group of 32: use -w32"),
        ("int4-kivi-g32-w0", "a window of 0 tokens is shorter than the group of 32: use -w32"),
        ("int4-kivi-g32-w80", "a window of 80 tokens is no multiple of the group of 32: use -w64 or -w96"),
    ],
)
def test_a_notation_of_what_cannot_be_says_what_can(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_kv(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys": "head"}, "keys are stored by token or by channel, not by 'head'"),
        ({"keys": "channel", "window": 32}, "keys by channel need a group"),
        ({"window": -1}, "window of a KV cache must be 0 or more, not -1"),
        ({"sinks": -2}, "sinks of a KV cache must be 0 or more, not -2"),
        ({"group": 0}, "group of a KV cache must be 1 or more, not 0"),
        ({"scale": torch.float64}, "scales of a KV cache are fp32, bf16 or fp16, not torch.float64"),
        ({"scale": torch.float8_e8m0fnu}, "scales of a KV cache are fp32, bf16 or fp16, not torch.float8_e8m0fnu"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        KVFormat(4, **settings)


def test_layers_without_keys_and_values_are_refused_before_any_work():
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"layer 0 of 'qwen3_next' is 'linear_attention'; int8-token is for layers"):
        KVCache(parse_kv("int8-token"), config)
