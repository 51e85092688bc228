"""GGUF files: stock transformers computes from them what we do, their keys are the model's, and the rest is refused."""

import copy
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import nn
from transformers import AutoModelForCausalLM

from quantforge import exporters, recipe
from quantforge import plan as planning
from quantforge.errors import ModelError, PlanError
from quantforge.exporters.gguf import FILE, Gguf, read_file
from quantforge.exporters.gguf.blocks import FORMATS, pack
from quantforge.models import tiny
from quantforge.models.load import quiet
from quantforge.numerics.formats import NAMED, parse
from quantforge.numerics.inputs import parse_inputs
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import fit, quantize

TYPES = list(FORMATS)
Q4_0, Q4_1, Q8_0 = (GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # the only one for which transformers reads its GGUF
}


def laid(model, dtype=torch.float32):
    """Return the plan of a model for rounding to Q4_0."""
    plan = planning.make(model, recipe.load("rtn"), dtype)
    fmt = FORMATS[Q4_0]
    return replace(plan, layers={name: replace(p, format=fmt) for name, p in plan.layers.items()})


def rounded(model, held):
    """Round the layers of the blocks in place, to one type or to each in turn → their codes."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            fmt = FORMATS[TYPES[len(layers) % 3] if held is None else held]
            w = module.weight.data.float()
            layers[name] = QWeight(quantize(w, fit(w, fmt), fmt), {})
            module.weight.data = layers[name].dequantize().to(module.weight.dtype)
    return layers


def written(folder, kind="llama", held=Q4_0, dtype=torch.float32, tokenizer=None, name="tiny", **changes):
    """Write a tiny model → (the model as it computes, its codes)."""
    model = tiny.make(kind, dtype=dtype, **{**KINDS[kind], **changes})
    with torch.no_grad():
        for parameter in model.parameters():  # norms of ones and biases of zeros would hide a permutation
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    plan = laid(model, dtype)
    layers = rounded(model, held)
    tensors = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in layers}
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    Gguf().write(folder, model, plan, layers, tensors, tokenizer, name)
    return model, layers


def stock(folder):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_holds_our_weights_and_gives_our_tokens(kind, tied, tmp_path):
    model, _ = written(tmp_path, kind, held=None, tie_word_embeddings=tied)
    loaded, ours = stock(tmp_path), model.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in loaded.state_dict().items())
    made = [m.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0) for m in (model, loaded)]
    assert torch.equal(*made)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def test_a_model_that_is_called_mistral_is_loaded_too(tmp_path):
    model, _ = written(tmp_path, "mistral", name="mistral")
    loaded = stock(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_is_read_back_is_what_was_written(kind, dtype, tmp_path):
    model, layers = written(tmp_path, kind, held=None, dtype=dtype, tie_word_embeddings=False)
    names = list(model.state_dict())
    found, tensors = read_file(tmp_path / FILE, model.config, names)
    assert found.keys() == layers.keys()
    for name, weight in found.items():
        q, own = weight.base, layers[name].base
        assert q.format == own.format
        assert torch.equal(q.codes, own.codes)
        assert torch.equal(q.scale, own.scale)
        assert q.zero is own.zero is None or torch.equal(q.zero, own.zero)
    assert tensors.keys() == {name for name in names if name.removesuffix(".weight") not in layers}
    for name, value in tensors.items():
        assert value.dtype == (torch.float32 if value.dim() == 1 else dtype)
        assert torch.equal(value.to(dtype), model.state_dict()[name])


@pytest.mark.parametrize("held", TYPES)
def test_codes_are_packed_as_they_are_and_floats_lose_nothing(held, tmp_path):
    model, layers = written(tmp_path, "qwen2", held=held, dtype=torch.bfloat16)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / FILE).tensors}
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type == GGMLQuantizationType.BF16
    assert tensors["blk.0.attn_q.bias"].tensor_type == GGMLQuantizationType.F32
    assert tensors["blk.1.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type == held
    assert np.array_equal(down.data, pack(layers["model.layers.1.mlp.down_proj"].base))
    embedding = torch.from_numpy(gguf.dequantize(tensors["token_embd.weight"].data, GGMLQuantizationType.BF16))
    assert torch.equal(embedding, model.get_input_embeddings().weight.float())


def keys(folder):
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / FILE).fields.items()}


def test_the_file_says_what_the_config_says(tmp_path):
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "rms_norm_eps": 2.0**-20}
    written(tmp_path, held=Q4_1, **changes)
    assert {name: value for name, value in keys(tmp_path).items() if not name.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "llama.vocab_size": 128,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 2.0**-20,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "no_vocab",
    }


@pytest.mark.parametrize(("kind", "said"), [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_architectures_have_the_names_that_llama_cpp_knows(kind, said, tmp_path):
    written(tmp_path, kind, held=Q8_0)
    found = keys(tmp_path)
    assert found["general.architecture"] == said
    assert found["general.file_type"] == 7
    assert found[f"{said}.attention.key_length"] == KINDS[kind].get("head_dim", 16)


def test_scaled_rotary_embeddings_say_so(tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model, layers = written(tmp_path, rope_parameters=scaled)
    divisors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / FILE).tensors}["rope_freqs.weight"]
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    assert np.allclose(plain / divisors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert divisors[0] == 1
    assert divisors[-1] == 8
    assert read_file(tmp_path / FILE, model.config, model.state_dict())[0].keys() == layers.keys()
    assert "llama3 scaling" in Gguf().notes(model.config, None)[0]

    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    written(tmp_path, rope_parameters=linear)
    found = keys(tmp_path)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("int4-g64-asym", Q4_1),
        ("int4-channel-asym-bf16", Q4_1),
        ("int4-g64-asym-fp16-zero-fp16", Q4_1),
        ("int4-g128-sym-bf16", Q4_0),
        ("int8-g64-asym", Q8_0),
        ("int8-channel-sym", Q8_0),
    ],
)
def test_integers_of_4_and_8_bits_become_blocks_of_32(text, becomes):
    fixed = Gguf().fix(parse(text))
    assert fixed == FORMATS[becomes]
    assert Gguf().fix(fixed) == fixed
    assert fixed.with_scale(torch.float16) == fixed


@pytest.mark.parametrize("fmt", [parse("int3-g64-asym"), parse("nf4-g64"), *NAMED.values()], ids=str)
def test_other_formats_stay_as_they_are_and_are_refused(fmt):
    model = tiny.make("llama")
    assert Gguf().fix(fmt) == fmt
    plan = laid(model)
    first = next(iter(plan.layers))
    plan = replace(plan, layers={**plan.layers, first: replace(plan.layers[first], format=fmt)})
    assert first in Gguf().refuses(plan)


class Fitted:
    extends_format = True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"format": parse("int4-g64-asym-fp16")},
            "stores blocks of 32, not int4-g64-asym-fp16 of .*leave --group-size",
        ),
        ({"format": parse("int8-g32-asym-fp16")}, "8 bits are symmetric.*leave --asymmetric out"),
        ({"format": parse("int3-g32-sym-fp16")}, "integers of 4 bits.*--bits 4 works"),
        ({"format": parse("int4-g32-sym-bf16")}, "stores int4-g32-sym-fp16, not int4-g32-sym-bf16"),
        ({"shape": (64, 48)}, "the 48 inputs of .* are no multiple of 32"),
        ({"transposed": True}, "is a Conv1D"),
        ({"inputs": parse_inputs("int8-token-sym")}, "no rounded inputs"),
        ({"corrections": (object(),)}, "nothing beside the codes"),
        ({"solver": Fitted()}, "nothing beside the codes"),
    ],
)
def test_what_cannot_stand_in_the_file_is_refused_with_what_could(change, said):
    plan = laid(tiny.make("llama"))
    assert Gguf().refuses(plan) is None
    assert Gguf().takes(plan)
    name = list(plan.layers)[3]
    changed = replace(plan, layers={**plan.layers, name: replace(plan.layers[name], **change)})
    assert not Gguf().takes(changed)
    with pytest.raises(PlanError, match=said):
        exporters.check(changed, Gguf())
    assert name in Gguf().refuses(changed)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gemma2", {}, "GGUF of llama, mistral, qwen2, qwen3, not of gemma2"),
        ("opt", {}, "not of opt"),
        ("mixtral", {}, "not of mixtral"),
        ("mistral", {}, "a window of 32 tokens"),
        ("llama", {"hidden_act": "gelu"}, "has silu, and this one gelu"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "is dynamic"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(kind, changes, said, tmp_path):
    model = tiny.make(kind, **changes)
    plan = laid(tiny.make("llama"))
    with pytest.raises(PlanError, match=said) as caught:
        Gguf().write(tmp_path, model, plan, {}, {}, None, "x")
    assert caught.value.number == 288
    assert not list(tmp_path.iterdir())
    assert "\n" not in str(caught.value)


def test_a_tensor_that_gguf_has_no_place_for_is_named(tmp_path):
    model = tiny.make("llama")
    with pytest.raises(PlanError, match=r"no place for the tensor 'model\.extra\.weight'"):
        Gguf().write(tmp_path, model, laid(model), {}, {"model.extra.weight": torch.zeros(2, 2)}, None, "x")


def test_a_quantization_config_is_no_gguf():
    assert Gguf().config(laid(tiny.make("llama")), []) == Gguf().tensors("x", None) == {}
    with pytest.raises(ModelError, match="says nothing of GGUF"):
        Gguf().read({}, {})


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model, _ = written(folder, held=Q4_1)
    return (folder / FILE).read_bytes(), model.config, list(model.state_dict())


def reads(raw, config, names, tmp_path):
    (tmp_path / FILE).write_bytes(raw)
    return read_file(tmp_path / FILE, config, names)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_files_that_are_cut_short_are_refused(share, example, tmp_path):
    raw, config, names = example
    with pytest.raises(ModelError, match="cannot be read") as caught:
        reads(raw[: int(len(raw) * share)], config, names, tmp_path)
    assert caught.value.number == 397


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GGUF\x03", b"GGUF\x63"),
        (b"GGUF", b"GGML"),
        (b"llama.block_count", b"llama.block_coxnt"),
        (b"blk.1.attn_q.weight", b"blk.7.attn_q.weight"),
        (
            b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama",
            b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00qwen2",
        ),
    ],
)
def test_files_that_were_changed_are_refused(old, new, example, tmp_path):
    raw, config, names = example
    assert raw.count(old) == 1
    with pytest.raises(ModelError, match="cannot be read"):
        reads(raw.replace(old, new), config, names, tmp_path)


def test_a_list_that_is_longer_than_the_file_is_refused_at_once(tmp_path):
    """Of a list of numbers that goes on where the file has ended, the library's reader reads nothing for ever."""
    writer = gguf.GGUFWriter(tmp_path / FILE, "llama")
    writer.add_array("numbers", [7] * 11)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    raw = (tmp_path / FILE).read_bytes()
    count = (11).to_bytes(8, "little")
    assert raw.count(count) == 1
    with pytest.raises(ModelError, match="it ends too early"):
        reads(raw.replace(count, (1 << 60).to_bytes(8, "little")), None, [], tmp_path)


def test_the_file_of_another_model_is_refused(example, tmp_path):
    raw, config, names = example
    other = copy.deepcopy(config)
    other.num_key_value_heads = 4
    with pytest.raises(ModelError, match=r"head_count_kv is 2, and config\.json says 4"):
        reads(raw, other, names, tmp_path)
    with pytest.raises(ModelError, match="is no tensor of the model"):
        reads(raw, config, [name for name in names if "layers.1" not in name], tmp_path)


def test_a_file_that_nests_arrays_without_end_is_refused(tmp_path):
    def text(value):
        return struct.pack("<Q", len(value)) + value

    deep = struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 0, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"k") + struct.pack("<I", 9)
    (tmp_path / FILE).write_bytes(header + deep)
    with pytest.raises(ModelError, match="QF-397") as caught:
        read_file(tmp_path / FILE, tiny.make("llama").config, [])
    assert str(caught.value).isprintable()


def test_a_model_with_a_tensor_that_gguf_has_no_place_for_is_refused_as_another_model(tmp_path):
    model, _ = written(tmp_path)
    with pytest.raises(ModelError, match=r"QF-397.*'model.more.weight'"):
        read_file(tmp_path / FILE, model.config, [*model.state_dict(), "model.more.weight"])
