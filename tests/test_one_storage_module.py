"""Only the storage module writes: found in the source, so that a new way past it is noticed."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import quantforge
from quantforge import store

PACKAGE = Path(inspect.getfile(quantforge)).parent
STORE = Path(inspect.getfile(store)).parent

# what changes the disk, as a call of a name or of anything's method; `open` is judged by its mode
CALLS = {
    *("write_text", "write_bytes", "touch", "unlink", "rmdir", "rename", "renames", "replace", "link", "symlink"),
    *("symlink_to", "hardlink_to", "remove", "removedirs", "truncate", "ftruncate", "fdopen", "mkstemp", "mkdtemp"),
    *("copy", "copy2", "copyfile", "copytree", "move", "rmtree", "make_archive", "tofile", "savez", "savetxt"),
    *("savefig", "save_file", "save_model", "save_pretrained", "write_to_file", "write_header_to_file"),
    *("write_kv_data_to_file", "write_tensors_to_file", "to_csv", "to_parquet", "TemporaryFile"),
    *("NamedTemporaryFile", "TemporaryDirectory", "fsync", "pwrite"),
}
# of these only that of the module named, for others have methods of the same name: list.remove, dict.copy, Result.save
OF_MODULE = {
    **{name: {"os"} for name in ("link", "remove")},
    **{name: {"shutil"} for name in ("copy", "move")},
    "save": {"torch", "np", "numpy"},
    "dump": {"json", "pickle", "yaml"},
}
CALLS |= OF_MODULE.keys()

# library code that writes into a staging folder which `publish` syncs, scratch that nobody keeps, and no file at all
ALLOWED = {
    ("result.py", "save_pretrained"): "into the staging folder",
    ("training/students.py", "save_pretrained"): "into the staging folder",
    ("training/qlora.py", "save_pretrained"): "into the staging folder",
    ("exporters/gguf/__init__.py", "write_header_to_file"): "into the staging folder",
    ("exporters/gguf/__init__.py", "write_kv_data_to_file"): "into the staging folder",
    ("exporters/gguf/__init__.py", "write_tensors_to_file"): "into the staging folder",
    ("benchmark/speed.py", "TemporaryDirectory"): "scratch",
    ("benchmark/speed.py", "save_pretrained"): "scratch",
    ("comparison/cells.py", "TemporaryDirectory"): "scratch",
    ("comparison/isolated.py", "TemporaryDirectory"): "scratch",
    ("training/paged.py", "TemporaryFile"): "scratch",
    ("plots/drawing.py", "savefig"): "into memory",
    ("memory.py", "write_text"): "a switch of the kernel's",
}


def writes(source: str) -> list[tuple[str, int]]:
    """Return the names and lines of the calls in `source` that change the disk."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil", "safetensors.torch"):
            found += [(a.name, node.lineno) for a in node.names if a.name in CALLS and a.name != "save"]
        elif isinstance(node, ast.Call) and changes(node):
            found.append((getattr(node.func, "attr", getattr(node.func, "id", "")), node.lineno))
    return found


def changes(node: ast.Call) -> bool:
    """Tell whether a call, by its name and what it is called on, changes the disk past the storage module."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    owner = getattr(node.func.value, "id", "?") if isinstance(node.func, ast.Attribute) else None
    if name == "open":
        return opens_to_write(node)
    if owner in ("store", "disk"):
        return False
    if name in OF_MODULE:
        return owner in OF_MODULE[name]
    if name == "replace":  # str.replace has two arguments
        return owner == "os" or (owner is not None and len(node.args) == 1 and not node.keywords)
    if name in ("write_text", "write_bytes"):  # as plain names they are the store's own
        return owner is not None
    return name in CALLS


def opens_to_write(node: ast.Call) -> bool:
    """Tell whether an `open`, of any module, names a mode that is not plainly one of reading."""
    method = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") not in ("io", "gzip", "bz2")
    modes = [k.value for k in node.keywords if k.arg == "mode"] or node.args[0 if method else 1 :][:1]
    if not modes:
        return False
    mode = modes[0]
    if isinstance(mode, ast.Constant) and isinstance(mode.value, str):
        return not set(mode.value) <= set("rbtU")
    return not (method or isinstance(mode, ast.Constant))  # `os.open(path, flags)` is told by the flags' names below


def test_nothing_outside_the_storage_module_writes():
    strangers, used = [], set()
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.is_relative_to(STORE):
            continue
        name = file.relative_to(PACKAGE).as_posix()
        for call, line in writes(file.read_text(encoding="utf-8")):
            used.add((name, call))
            if (name, call) not in ALLOWED:
                strangers.append(f"{name}:{line} {call}")
    assert strangers == []
    assert ALLOWED.keys() <= used, "allowed and not there"


def test_no_flags_of_the_systems_own_open_write():
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC"):
            assert flag not in text or file.is_relative_to(STORE), f"{file} opens with {flag}"


@pytest.mark.parametrize(
    "source",
    [
        *(
            "open(p, 'w')",
            "open(p, mode='ab')",
            "p.open('x')",
            "open(p, mode)",
            "io.open(p, 'r+')",
            "gzip.open(p, 'wb')",
            "p.rename(q)",
            "p.replace(q)",
            "f.truncate(3)",
        ),
        *("p.write_text('')", "(a / b).write_bytes(b'')", "torch.save(x, p)", "save_file(t, p)", "os.rename(a, b)"),
        *("os.replace(a, b)", "from os import rename", "from safetensors.torch import save_file", "shutil.move(a, b)"),
        *("json.dump(x, f)", "np.save(p, x)", "p.unlink()", "shutil.rmtree(p)", "tempfile.mkstemp()"),
        *("p.touch()", "model.save_pretrained(p)", "safetensors.torch.save_file(t, p)", "figure.savefig(p)"),
    ],
)
def test_each_way_to_write_would_be_found(source):
    assert writes(source)


@pytest.mark.parametrize(
    "source",
    [
        *("open(p)", "open(p, 'rb')", "p.open()", "p.open('r', encoding='utf-8')", "open(p, encoding='utf-8')"),
        *("'a'.replace('b', 'c')", "replace(layer, a=1)", "copy.copy(x)", "write_text(p, 'x')", "result.save(p)"),
        *("json.dumps(x)", "p.read_text()", "store.stream", "names.remove(x)", "tarfile.open(p)"),
    ],
)
def test_what_reads_is_not_taken_for_writing(source):
    assert not writes(source)
