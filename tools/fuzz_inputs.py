"""The inputs of tools/fuzz.py: sound ones, what is put into them, and the damaged input number n of each target."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

LARGEST = 4096  # bytes of an input


def frame(header: bytes, data: int = 0) -> bytes:
    """Return a safetensors file with this header and as many bytes of data."""
    return struct.pack("<Q", len(header)) + header + bytes(data)


ENTRY = b'"%s": {"dtype": "%s", "shape": [2, 3], "data_offsets": [%d, %d]}'
HEADER = (
    b'{"__metadata__": {"format": "pt"}, ' + ENTRY % (b"a", b"F32", 0, 24) + b", " + ENTRY % (b"b", b"BF16", 24, 36)
)
TASK = (
    b"task: mine\noutput_type: multiple_choice\ndataset_path: json\ndataset_kwargs:\n  data_files: items.jsonl\n"
    b"test_split: test\ndoc_to_text: 'Q: {{question}}'\ndoc_to_choice: answers\ndoc_to_target: label\n"
)
SEEDS: dict[str, list[bytes]] = {
    "header": [b"\x24" + HEADER + b"}", b"\x0c" + b"{" + ENTRY % (b"b", b"BF16", 0, 12) + b"}", b"\0" + frame(b"{}")],
    "index": [
        b'{"metadata": {"total_size": 2}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
        b'{"weight_map": {"a": "../3.safetensors"}}',
    ],
    "recipe": [
        b"gptq\nbits 4\ngroup_size 64\nsymmetric yes\nsettings solver.damp_percent=0.05\nsettings solver.act_order=yes",
        b"awq+gptq\nweights int4-g64-asym\ninputs int8-token\noverrides *.down_proj:bits=8,group_size=32",
        b"rtn+lorc\nweights nf4-g64\noverrides *.layers.0.*:skip\nsettings correction.rank=8",
        b"smoothquant\ninputs int8-tensor-static\nsettings transform.alpha=0.5\nweights e4m3-channel",
        b"llm-int8\nsettings inputs.threshold=6.0\noverrides *.v_proj:method=rtn,symmetric=no",
        b"spqr\nweights mxfp4\ngroup_size -1",
    ],
    "tasks": [TASK, b"group: all\ntask:\n  - mine\n", TASK + b"description: &a [x, *a]\nnum_fewshot: 1\n"],
}


def _pieces(words: bytes, *more: bytes) -> list[bytes]:
    return [*words.split(), *more]


PIECES = {
    "header": _pieces(
        rb"""{ } [ ] " , : 0 -1 9223372036854775808 18446744073709551615 1e999 NaN null true "dtype" "shape" "a"
        "data_offsets" "__metadata__" F4 F8_E4M3 C64 \ud800 \u0000 ../""",
        *(b"\xff", b"[" * 200),
    ),
    "index": _pieces(
        rb"""../ ..\\ / C: \\\\srv\\ \u0000 .safetensors .bin "weight_map" {} [] null 1 \ud800 %2e%2e/ ~
        1.safetensors ./1.safetensors""",
        b"\xff",
    ),
    "recipe": _pieces(
        b"""int e4m3 nf4 -g -asym -channel -tensor -token -static narrow solver. inputs. = : , * [ ] ? ! + nan inf
        -1 0 1e400 99999999999999999999 yes float method= skip hqq quantile obq zeroquant mxfp4 nvfp4 -dq""",
        *(b"settings ", b"overrides ", b"weights ", b"\n", b"\xff", b"\0"),
    ),
    "tasks": _pieces(
        rb"""*a [ ] { } ... 2001-99-99 0o9 1:99:99 {{ }} {% %} ../ /etc/passwd ' " \x null -1 .inf = ~""",
        *(b"&a ", b"<<: ", b"!!python/object:os.system ", b"!function x.y", b"!!int ", b"!!binary ", b"!!float x"),
        *(b"- ", b"? ", b": ", b"| ", b"> ", b"\t", b"\n", b"%YAML 9.9\n", b"---\n", b"for x in question", b"\xff"),
    ),
}
VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        7,
        24,
        36,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        0.5,
        1e300,
        float("nan"),
        "",
        "a",
        "F32",
        "BF16",
    ),
    *(
        "F4",
        "C64",
        "I64",
        "BOOL",
        "../a",
        "1.safetensors",
        "2.safetensors",
        "\ud800",
        "\0",
        "__metadata__",
        {},
        {"a": 1},
    ),
    *([], [0], [0, 0], [0, 24], [24, 36], [2, 3], [2**62, 2**62]),
]


def reshaped(draw: random.Random, node: Any) -> Any:
    """Return a JSON value with one of its parts, or all of it, replaced, removed or named otherwise."""
    if not isinstance(node, dict | list) or not node or draw.random() < 0.2:
        return draw.choice(VALUES)
    if isinstance(node, list):
        at = draw.randrange(len(node))
        return [*node[:at], reshaped(draw, node[at]), *node[at + 1 :]]
    key, how = draw.choice(list(node)), draw.random()
    rest = {name: value for name, value in node.items() if name != key}
    if how < 0.1:
        return rest
    if how < 0.25:
        return {**rest, str(draw.choice(VALUES)): node[key]}
    if how < 0.4:
        return {**node, str(draw.choice(VALUES)): reshaped(draw, node[key])}
    return {**node, key: reshaped(draw, node[key])}


def mutated(target: str, number: int) -> bytes:
    """Return input `number` of a target: one of its seeds, changed in one to eight places.

    Of JSON every second one has its values changed, and stays JSON.
    """
    draw = random.Random(f"{target}:{number}")
    seed = draw.choice(SEEDS[target])
    raw = bytearray(seed)
    start = {"header": 1, "index": 0}.get(target)
    if start is not None and raw[start : start + 1] == b"{" and draw.random() < 0.5:
        value = json.loads(seed[start:])
        for _ in range(draw.choice((1, 1, 2, 3))):
            value = reshaped(draw, value)
        return seed[:start] + json.dumps(value).encode()[:LARGEST]
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(len(raw) + 1)
        until = min(len(raw), at + draw.choice((1, 1, 2, 4, 16, 64)))
        match draw.randrange(6):
            case 0:
                raw[at:until] = b""
            case 1:
                raw[at:at] = draw.choice(PIECES[target]) * draw.choice((1, 1, 1, 2, 50))
            case 2:
                raw[at:until] = draw.choice(PIECES[target])
            case 3:
                raw[at:until] = draw.randbytes(until - at)
            case 4:
                raw[at:at] = raw[at:until] * draw.choice((1, 2, 20))
            case 5:
                other = draw.choice(SEEDS[target])
                raw[at:] = other[draw.randrange(len(other)) :]
    return bytes(raw[:LARGEST])
