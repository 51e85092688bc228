"""What a GGUF file says of a model: which architectures there are, their keys, and the order of their rows.

llama.cpp rotates neighbouring pairs of a head's outputs where transformers' llama rotates halves, so the rows of query
and key projections stand in another order in files of that architecture: row i of the first half of a head is followed
by row i of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantforge.errors import nearest

ROPE_FREQUENCIES = "rope_freqs.weight"
_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp knows it.

    name       what `general.architecture` says
    reordered  True: the rows of query and key projections are
    """

    name: str
    reordered: bool = False

    def names(self, blocks: int) -> Any:
        """Return the library's map from transformers' names of tensors to those in the file."""
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(known[self.name], blocks)


ARCHITECTURES = {
    "llama": Architecture("llama", reordered=True),
    "mistral": Architecture("llama", reordered=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}


def refuses(config: Any) -> str | None:
    """Return why a model with this transformers config cannot be written as GGUF, and what could; None if it can."""
    kind = str(getattr(config, "model_type", ""))
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"quantforge writes GGUF of {known}, not of {kind}: {nearest(kind, ARCHITECTURES)}native can hold it."
    rope = _rope(config)
    if rope.get("rope_type", "default") not in _ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return (
            f"the rotary embedding of this {kind} is {rope.get('rope_type')}, and quantforge writes GGUF with "
            f"{', '.join(_ROPES)}; native can hold it."
        )
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        return (
            f"this {kind} looks back over a window of {window:,} tokens, for which llama.cpp's {kind} has no place; "
            "native can hold it."
        )
    if config.hidden_act != "silu":
        return f"llama.cpp's {kind} has silu, and this one {config.hidden_act}; native can hold it."
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return f"this {kind} has biases that transformers does not read from GGUF; native can hold it."
    return None


def notes(config: Any) -> list[str]:
    """Return what a user should know of a model that is written as GGUF."""
    kind = _rope(config).get("rope_type", "default")
    if kind == "default":
        return []
    return [
        f"transformers does not read the {kind} scaling of rotary embeddings from GGUF, as llama.cpp does; load with "
        "config=AutoConfig.from_pretrained(DIR) beside gguf_file"
    ]


def head_dim(config: Any) -> int:
    """Return the outputs of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write(writer: gguf.GGUFWriter, config: Any, name: str, file_type: gguf.LlamaFileType) -> None:
    """Write the keys that describe a model whose config `refuses` did not refuse; tensors that stand for some too.

    name  what people call the model
    """
    writer.add_type("model")
    writer.add_name(
        "Mistral" if name == "mistral" else name
    )  # by which transformers would look for another architecture
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "llama3":
        writer.add_tensor(ROPE_FREQUENCIES, _divisors(config).numpy())


def order(name: str, config: Any) -> Tensor | None:
    """Return which row of transformers' tensor `name` stands at each row of the file; None if all keep their places."""
    part = name.rsplit(".", 2)[-2]
    if part not in ("q_proj", "k_proj") or not ARCHITECTURES[config.model_type].reordered:
        return None
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    return torch.arange(heads * head_dim(config)).view(heads, 2, -1).transpose(1, 2).flatten()


def _rope(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary embedding."""
    return dict(getattr(config, "rope_parameters", None) or {})


def _divisors(config: Any) -> Tensor:
    """Return what llama3's scaling divides each frequency by, [head_dim / 2] float32."""
    size, rope = head_dim(config), _rope(config)
    plain: Tensor = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaled: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    return plain / scaled
