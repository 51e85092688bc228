"""What loaders ask of a `quantization_config`: which keys it may have, and which layers it says are quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.quantizers.quantizers_utils import should_convert_module

from quantforge.errors import nearest
from quantforge.exporters import gptq
from quantforge.models import arch
from quantforge.models.headers import show
from quantforge.numerics.formats import Format
from quantforge.verification.report import Finding

# compressed-tensors 0.17.0, which vLLM 0.32 pins: schemes and arguments with any other key are refused
_SCHEME = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)
_COMPRESSED = (
    *("quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "version"),
    *("global_compression_ratio", "sparsity_config", "transform_config", "run_compressed"),
)
_BITSANDBYTES = (
    *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype"),
    *("bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_threshold"),
    *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules"),
)
_GPTQ = (
    *("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head", "checkpoint_format", "pack_dtype", "meta"),
    *("dynamic", "modules_in_block_to_quantize", "damp_percent", "true_sequential", "static_groups", "format"),
    *("act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "dataset"),
    *("max_input_length", "model_seqlen", "module_name_preceding_first_block", "pad_token_id", "tokenizer"),
    *("model_file_base_name", "model_name_or_path", "quantizer", "is_marlin_format", "use_exllama", "exllama_config"),
)
_AWQ = (
    *("quant_method", "bits", "group_size", "zero_point", "version", "format", "modules_to_not_convert", "backend"),
    *("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"),
)
KEYS: dict[str, tuple[str, ...]] = {
    "compressed-tensors": _COMPRESSED,
    "gptq": _GPTQ,
    "awq": _AWQ,
    "bitsandbytes": _BITSANDBYTES,
    "bitsandbytes8": _BITSANDBYTES,
    "native": ("quant_method", "version", "layers"),
    "gguf": ("quant_method",),
}
_NATIVE_LAYER = ("shape", "format", "residuals", "inputs")
# what must be so for the numbers in the files to mean what they are read as, and is not read itself
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "compressed-tensors": {"quantization_status": ("compressed",)},
    "gptq": {"sym": (True,), "pack_dtype": ("int32", None), "lm_head": (False, None)},
    "awq": {},
    "bitsandbytes": {"bnb_4bit_quant_storage": ("uint8", None), "load_in_8bit": (False, None)},
    "bitsandbytes8": {"load_in_4bit": (False, None)},
    "native": {},
    "gguf": {},
}


def check_keys(container: str, config: Mapping[str, Any]) -> list[Finding]:
    """Return what is wrong with the keys of a `quantization_config`, each named with the path to it."""
    found = _unknown("", config, KEYS[container])
    for key, allowed in _FIXED[container].items():
        value = config.get(key)
        if value not in allowed or (isinstance(value, bool) and not any(value is a for a in allowed)):
            found.append(_fault(f"{key} is {show(value)}, and loaders need {show(allowed[0])}"))
    if container == "compressed-tensors":
        found += _check_groups(config)
    if container == "gptq":
        found += _check_dynamic(config.get("dynamic"))
    if container == "native" and isinstance(config.get("layers"), dict):
        for name, about in config["layers"].items():
            found += _unknown(f"layers.{name}.", about, _NATIVE_LAYER)
    return found


def _fault(text: str) -> Finding:
    return Finding(f"config.json: quantization_config.{text}.", 349)


def _unknown(where: str, value: object, known: tuple[str, ...]) -> list[Finding]:
    if not isinstance(value, Mapping):
        return []
    return [
        _fault(f"{where}{key} is no key that loaders know: {nearest(str(key), known)}known are {', '.join(known)}")
        for key in value
        if key not in known
    ]


def _check_dynamic(patterns: object) -> list[Finding]:
    """Return what is wrong with GPTQ's patterns of layers to leave out; those that change bits are not read."""
    if not isinstance(patterns, Mapping):
        return [] if patterns is None else [_fault(f"dynamic is {show(patterns)}, and loaders need patterns of layers")]
    found = []
    for pattern in patterns:
        if not pattern.startswith(gptq.WITHOUT):
            found.append(_fault(f"dynamic.{pattern} gives layers another format, which quantforge does not read"))
        elif not _is_pattern(pattern.removeprefix(gptq.WITHOUT)):
            found.append(_fault(f"dynamic.{pattern} is no pattern"))
    return found


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _check_groups(config: Mapping[str, Any]) -> list[Finding]:
    """Return what compressed-tensors itself, and the version that vLLM pins, would refuse."""
    found = []
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        where = f"config_groups.{name}."
        found += _unknown(where, group, _SCHEME)
        for part in ("weights", "input_activations", "output_activations"):
            args = group.get(part) if isinstance(group, Mapping) else None
            found += _unknown(f"{where}{part}.", args, _ARGS)
    return found or _check_values(config)


def _check_values(config: Mapping[str, Any]) -> list[Finding]:
    from compressed_tensors.quantization import QuantizationConfig

    known = {key: value for key, value in config.items() if key in QuantizationConfig.model_fields}
    try:
        QuantizationConfig.model_validate(known)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        listed = error.errors() if hasattr(error, "errors") else []
        if not listed:
            return [_fault(f"config_groups is refused by compressed-tensors ({error})")]
        return [_fault(f"{'.'.join(map(str, e['loc']))}: {e['msg']}") for e in listed]
    return []


def check_kinds(container: str, config: Mapping[str, Any], formats: Iterable[Format]) -> list[Finding]:
    """Return what a config says of the formats of its layers that is not so, where the layers say it themselves."""
    if container != "bitsandbytes":
        return []
    said = {"bnb_4bit_quant_type": config.get("bnb_4bit_quant_type", "fp4")}
    said["bnb_4bit_use_double_quant"] = config.get("bnb_4bit_use_double_quant", False)
    found = []
    for fmt in set(formats):
        held = {"bnb_4bit_quant_type": fmt.grid.name, "bnb_4bit_use_double_quant": isinstance(fmt.scale, Format)}
        found += [
            f"{key} is {show(said[key])}, but layers are stored in {fmt}" for key in held if held[key] != said[key]
        ]
    return [_fault(text) for text in sorted(set(found))]


def check_targets(config: Mapping[str, Any], names: Mapping[str, str]) -> list[Finding]:
    """Return the targets of compressed-tensors that name no layer.

    names  of every linear layer, to its name in the files
    """
    found = []
    groups = config.get("config_groups")
    for group, about in groups.items() if isinstance(groups, Mapping) else ():
        for target in _texts(about.get("targets") if isinstance(about, Mapping) else None):
            if not any(_matches(target, name) for name in _both(names)):
                found.append(_fault(f"config_groups.{group}.targets: {show(target)} names no linear layer"))
    return found


def told(container: str, config: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    """Return which linear layers loaders will expect to be quantized, going by the config.

    names  of every linear layer, to its name in the files
    """
    if container == "native":
        layers = config.get("layers")
        return set(layers) if isinstance(layers, Mapping) else set()
    if container == "compressed-tensors":
        groups = config.get("config_groups")
        about = groups.values() if isinstance(groups, Mapping) else ()
        targets = [t for group in about if isinstance(group, Mapping) for t in _texts(group.get("targets"))]
        ignored = _texts(config.get("ignore"))
        return {n for n, file in names.items() if _any(targets, n, file) and not _any(ignored, n, file)}
    if container == "gptq":
        return {name for name in names if _gptq_takes(name, config)}
    key = "modules_to_not_convert" if container == "awq" else "llm_int8_skip_modules"
    skipped = _texts(config.get(key)) or ["lm_head"]
    return {name for name in names if name != "lm_head" and should_convert_module(name, skipped)}


def _gptq_takes(name: str, config: Mapping[str, Any]) -> bool:
    patterns = config.get("dynamic")
    texts = patterns if isinstance(patterns, Mapping) else ()
    left_out = [f"re:{p.removeprefix(gptq.WITHOUT)}" for p in texts if p.startswith(gptq.WITHOUT)]
    if arch.block_path(name) is None or _any(left_out, name):
        return False
    listed = config.get("modules_in_block_to_quantize")
    if not isinstance(listed, list) or not listed:
        return True
    modules = [m for item in listed for m in (item if isinstance(item, list) else [item])]
    return any(name == m or name.endswith(f".{m}") for m in modules)


def _any(targets: list[str], *names: str) -> bool:
    return any(_matches(target, name) for target in targets for name in names)


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], name) is not None
        except re.error:
            return False
    return target in ("Linear", name)


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _both(names: Mapping[str, str]) -> Iterable[str]:
    return {*names, *names.values()}
