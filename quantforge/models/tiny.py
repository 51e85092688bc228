"""Tiny random models of each architecture, made in memory: for tests and for trying things out."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantforge.errors import pick

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "sliding_window": 32,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": None},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96},
}
_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}
_SHARED_NAMES = {"opt": ("intermediate_size", "num_key_value_heads", "head_dim"), "gpt2": tuple(_COMMON)[1:8]}


def names() -> list[str]:
    """Return the dense architectures that `make` knows."""
    return list(_OWN)


def mixtures() -> list[str]:
    """Return the architectures with experts that `make` knows."""
    return list(_MIXTURES)


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a random causal language model of architecture `kind`: two blocks, width 64, 128 tokens.

    Experts, if it has any, are four, and fused as transformers fuses them.

    The global random state is left as it was. `changes` override fields of the config.
    """
    own = {**_OWN, **_MIXTURES}
    pick("architecture", kind, own)
    settings = {k: v for k, v in _COMMON.items() if k not in _SHARED_NAMES.get(kind, ())}
    config = AutoConfig.for_model(kind, **{**settings, **own[kind], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3 / parameter.shape[-1] ** 0.25)
    return model.eval()
