"""Score a checkpoint with stock transformers (and peft for its adapter); prints JSON. Knows nothing of quantforge.

    python stock.py FOLDER EXPECTED.json

EXPECTED holds the token ids to score and to go on from, and the digests of the dequantized weights.
"""

import json
import math
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

PACKAGES = ("torch", "transformers", "compressed-tensors", "bitsandbytes", "gguf", "peft", "accelerate")


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    file = next((p.name for p in folder.glob("*.gguf")), None)
    named = {"gguf_file": file} if file else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **named)
    if (folder / "adapter").is_dir():
        from peft import PeftModel

        model(torch.tensor([[0]]))  # compressed-tensors unpacks its weights at the first forward; peft looks for them
        model = PeftModel.from_pretrained(model, folder / "adapter")
    return model.eval()


def weight(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return what a layer computes with in `dtype`, in float32."""
    stored = module.weight
    if hasattr(stored, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(stored.data, stored.quant_state).to(dtype).float()
    if hasattr(stored, "SCB"):  # its first forward moves codes and scales into the layer's state
        codes, scale = (stored.data, stored.SCB) if stored.SCB is not None else (module.state.CB, module.state.SCB)
        return codes.float() * (scale.float() / 127)[:, None]
    return stored.detach().float()


def digest(tensor: torch.Tensor) -> str:
    return sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()


def layer(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return a layer by its name, without the adapter around it."""
    modules = {key.removeprefix("base_model.model."): m for key, m in model.named_modules()}
    return getattr(modules[name], "base_layer", modules[name])


def has_state(model: torch.nn.Module, name: str) -> bool:
    return hasattr(getattr(layer(model, name), "weight", None), "quant_state")


def digests(model: torch.nn.Module, names: set, dtype: torch.dtype) -> dict:
    return {name: digest(weight(layer(model, name), dtype)) for name in names}


def main(folder: Path, expected: dict) -> dict:
    torch.set_grad_enabled(False)
    dtype = getattr(torch, expected["dtype"])
    model = load(folder, dtype)
    # bitsandbytes packs 4 bits anew at the first forward, which others need to have weights at all
    early = digests(model, {name for name in expected["digests"] if has_state(model, name)}, dtype)
    ids = torch.tensor(expected["windows"])
    losses, tops = [], []
    for window in ids:
        logits = model(window[None]).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]).item())
        tops += logits[:-1].argmax(-1).tolist()
    written = []
    for prompt in expected["prompts"]:
        start = torch.tensor([prompt])
        out = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_new_tokens=expected["new_tokens"],
            min_new_tokens=expected["new_tokens"],
            pad_token_id=0,
        )
        written.append(out[0, start.shape[1] :].tolist())
    found = early | digests(model, set(expected["digests"]) - set(early), dtype)
    differ = [name for name, wanted in expected["digests"].items() if found[name] != wanted]
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "top": tops,
        "tokens": written,
        "differ": differ,
        "versions": {name: version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))
