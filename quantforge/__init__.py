"""quantforge: post-training quantization and compression of language models.

result = quantforge.quantize("path/to/model", method="gptq", bits=4, group_size=64)
result.save("path/to/checkpoint")
quantforge.evaluate("path/to/checkpoint").perplexity
model = quantforge.load("path/to/checkpoint")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantforge.api import evaluate, generate, load, quantize
    from quantforge.comparison import compare
    from quantforge.conversion import convert
    from quantforge.verification import verify

__all__ = ["__version__", "compare", "convert", "evaluate", "generate", "load", "quantize", "verify"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch and what needs it only when a function is first asked for, so that `--help` need not wait."""
    homes = {"compare": "comparison", "convert": "conversion", "verify": "verification"}
    if name in __all__:
        return getattr(import_module(f"quantforge.{homes.get(name, 'api')}"), name)
    raise AttributeError(f"module 'quantforge' has no attribute {name!r}")
