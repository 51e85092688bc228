"""quantforge: post-training quantization and compression of language models.

result = quantforge.quantize("path/to/model", method="gptq", bits=4, group_size=64)
result.save("path/to/checkpoint")
quantforge.evaluate("path/to/checkpoint").perplexity
model = quantforge.load("path/to/checkpoint")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantforge.api import evaluate, load, quantize
    from quantforge.comparison import compare

__all__ = ["__version__", "compare", "evaluate", "load", "quantize"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch and what needs it only when a function is first asked for, so that `--help` need not wait."""
    if name in ("evaluate", "load", "quantize"):
        from quantforge import api

        return getattr(api, name)
    if name == "compare":
        from quantforge.comparison import compare

        return compare
    raise AttributeError(f"module 'quantforge' has no attribute {name!r}")
