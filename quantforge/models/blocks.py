"""The decoder blocks of a model: all in memory, or each read from its files when it is entered and dropped afterwards.

What is to be done to a block's float weights before it is used, such as taking scales, is done whenever it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantforge import memory
from quantforge.errors import ResourceError
from quantforge.models import arch, check, moe
from quantforge.models.headers import TensorInfo, show
from quantforge.models.load import Source, quiet

Step = Callable[[nn.Module, int], None]
_CPU = torch.device("cpu")


class Blocks:
    """The decoder blocks of `model`, which are in memory.

    path  full name of their list
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.path, self.modules = arch.find_blocks(model)

    def __len__(self) -> int:
        return len(self.modules)

    def enter(self, index: int, without: Collection[str] = ()) -> None:
        """Have the weights of block `index` in memory, save those of layers `without`; no others need be."""

    def leave(self) -> None:
        """Let all weights go that need not be in memory."""

    def prepare(self, step: Step) -> None:
        """Do `step`, called with the model and a block's index, to every block before it is used again."""
        for index in range(len(self)):
            step(self.model, index)

    def forget(self, step: Step) -> None:
        """Do `step` to no block any more."""

    def twin(self) -> Blocks:
        """Return the blocks of a copy of the model."""
        return Blocks(copy.deepcopy(self.model))

    def state(self, without: Collection[str]) -> Iterator[tuple[str, Tensor | None]]:
        """Yield all of the model's state by name, each tied tensor once; None for the weight of a layer in `without`.

        What a streamed block holds is there until the next is asked for.
        """
        twice, entered = _tied(self.model), -1
        for name in self.model.state_dict():
            inner = name.removeprefix(f"{self.path}.")
            index = int(inner.partition(".")[0]) if inner != name else -1
            if index not in (-1, entered):
                self.enter(index, without)
                entered = index
            if name.removesuffix(".weight") in without:
                yield name, None
            elif name not in twice:
                yield name, self.value(name)
        self.leave()

    def value(self, name: str) -> Tensor:
        """Return a parameter or a buffer of the model."""
        place, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(place), leaf)
        return found.detach()


class Streamed(Blocks):
    """Blocks whose weights stay in the model's files; at most one is in memory at a time.

    files  every tensor of the files, by its name in the model
    """

    def __init__(
        self, model: nn.Module, files: Mapping[str, TensorInfo], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(model)
        self.files, self.dtype, self.device = files, dtype, device
        self.steps: list[Step] = []
        self.entered: int | None = None

    def enter(self, index: int, without: Collection[str] = ()) -> None:
        """Read block `index` as `load.model` would have it, and do to it what was asked for; drop the one before."""
        self.leave()
        for name, part in self.modules[index].named_modules(prefix=f"{self.path}.{index}"):
            left_out = ("weight",) if name in without else ()
            _load_own(part, f"{name}.", self.files, self.dtype, self.device, left_out)
        self.entered = index
        for step in self.steps:
            step(self.model, index)

    def leave(self) -> None:
        """Drop the weights of the block that is in memory."""
        if self.entered is not None:
            _drop(self.modules[self.entered])
            self.entered = None
            memory.release()

    def prepare(self, step: Step) -> None:
        """Do `step` to every block whenever it is read."""
        self.steps.append(step)

    def forget(self, step: Step) -> None:
        """Do `step` to no block any more."""
        self.steps.remove(step)

    def value(self, name: str) -> Tensor:
        """Return a parameter or a buffer of the model, from its file if it is not in memory."""
        found = super().value(name)
        return read(self.files[name]).to(self.dtype).to(found.dtype) if found.is_meta else found

    def twin(self) -> Streamed:
        """Return the blocks of a copy of the model, read from the same files."""
        self.leave()
        found = Streamed(copy.deepcopy(self.model), self.files, self.dtype, self.device)
        found.steps = list(self.steps)
        return found


def _tied(model: nn.Module) -> set[str]:
    """Return the names of parameters that are another one under a second name, under which no file has them."""
    called: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        called.setdefault(id(parameter), []).append(name)
    second = getattr(model, "all_tied_weights_keys", {})
    return {
        n for names in called.values() for n in names if n != min(names, key=lambda n: (n in second, names.index(n)))
    }


def can_stream(source: Source) -> bool:
    """Tell whether every parameter of a model stands in its safetensors files under the name that it has in memory."""
    return source.folder is not None and not source.trust_remote_code and not _absent(source.skeleton(), source)


def stream(source: Source, device: torch.device) -> Streamed:
    """Return the blocks of a model in float32, in evaluation mode, whose blocks and output head have no weights yet.

    These are on the meta device. Buffers, and what else the forward needs, are in memory, with the values that
    `load.model` gives them. Raises ModelError for NaN or infinity, ResourceError for a model that cannot be read so.
    """
    if source.folder is None:
        raise ResourceError(521, f"{source.name} is no folder of safetensors, so it cannot be read block by block.")
    memory.return_large_pieces()
    check.check_tensors(((name, read(info)) for name, info in source.folder.tensors.items()), source.dtype)
    with quiet(), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(source.config, dtype=source.dtype)
    model.tie_weights()  # type: ignore[operator]
    moe.unfuse(model)
    if lost := _absent(model, source):
        raise ResourceError(
            521, f"{show(source.name)} stores {show(lost[0])} under another name, so it cannot be read block by block."
        )
    model = model.float().eval()
    files = in_model(source, model)
    path, _ = arch.find_blocks(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is inputs.weight:
        head = None
    for name, module in model.named_modules():
        if not f"{name}.".startswith(f"{path}.") and module is not head:
            _load_own(module, f"{name}." if name else "", files, source.dtype)
    model.tie_weights()  # type: ignore[operator]
    for name, buffer in model.named_buffers():
        if name in files:
            buffer.copy_(read(files[name]))
    return Streamed(model.to(device) if device.type != "cpu" else model, files, source.dtype, device)


def in_model(source: Source, model: nn.Module) -> dict[str, TensorInfo]:
    """Return the tensors of a checked folder by the names that `model` has for them."""
    assert source.folder is not None
    named = moe.as_in_model(source.config.model_type, source.folder.tensors)
    wanted = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {f"{prefix}{n}" if n not in wanted and f"{prefix}{n}" in wanted else n: t for n, t in named.items()}


def _absent(model: nn.Module, source: Source) -> list[str]:
    """Return the parameters of `model` (each once, if tied) that no tensor of the files is called like."""
    files = in_model(source, model)
    called: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        called.setdefault(id(parameter), []).append(name)
    return [names[0] for names in called.values() if not any(name in files for name in names)]


def read(info: TensorInfo) -> Tensor:
    """Return one tensor as it is stored; its file is open only meanwhile, and none of it stays mapped."""
    with safe_open(info.file, framework="pt") as file:
        found: Tensor = file.get_tensor(info.name)
        return found.clone()


def _load_own(
    module: nn.Module,
    prefix: str,
    files: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    device: torch.device = _CPU,
    without: Collection[str] = (),
) -> None:
    """Read the parameters of `module` itself that stand in the files, rounded to `dtype`, in float32."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        info = files.get(f"{prefix}{name}")
        if info is not None and name not in without:
            value = read(info).to(dtype).to(parameter.dtype).to(device)
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _drop(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
