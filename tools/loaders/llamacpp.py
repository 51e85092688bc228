"""Score a GGUF file with llama.cpp through llama-cpp-python; prints JSON. Knows nothing of quantforge.

python llamacpp.py FOLDER EXPECTED.json
"""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main(folder: Path, expected: dict) -> dict:
    file = next(folder.glob("*.gguf"))
    llm = Llama(str(file), n_ctx=len(expected["windows"][0]) + 1, logits_all=True, verbose=False)
    losses, tops = [], []
    for window in expected["windows"]:
        llm.reset()
        llm.eval(window)
        logits = np.array(llm.scores[: len(window) - 1], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        told = logits[np.arange(len(logits)), window[1:]] - np.log(np.exp(logits).sum(-1))
        losses.append(-float(told.mean()))
        tops += logits.argmax(-1).tolist()
    written = []
    for prompt in expected["prompts"]:
        llm.reset()
        llm.eval(prompt)
        new: list[int] = []
        for _ in range(expected["new_tokens"]):
            new.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
            llm.eval(new[-1:])
        written.append(new)
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "top": tops,
        "tokens": written,
        "differ": None,
        "words": [
            text
            for text, ids in expected["words"].items()
            if llm.tokenize(text.encode(), add_bos=False, special=False) != ids
        ],
        "versions": {"llama-cpp-python": version("llama-cpp-python")},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))
