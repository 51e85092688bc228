"""What all tests share: one thread, reproducible examples, and layers to quantize."""

import os
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantforge.numerics.problem import Problem

settings.register_profile("quantforge", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("quantforge")
torch.set_num_threads(1)
os.environ["QUANTFORGE_CACHE"] = ""  # nothing is taken over from earlier runs, and nothing left


def _load(name: str) -> ModuleType:
    """Import tests/`name`.py, which pytest's importlib mode leaves off the path."""
    spec = spec_from_file_location(f"quantforge_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_PROBLEMS = _load("problems")


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    """Return the factory `problem(fmt, out, width, ...)` of tests/problems.py."""
    return _PROBLEMS.problem


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """Return tests/problems.py, which also holds GPTQ and OBQ in plain float64."""
    return _PROBLEMS


@pytest.fixture
def change_tensors() -> Callable[[Path, Callable[[dict[str, Tensor]], object]], None]:
    """Return what lets a function change the tensors of a checkpoint's file in its folder."""

    def change(folder: Path, what: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(folder / "model.safetensors")
        what(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change
