"""Open a checkpoint cold and check all of it: every tensor, every key of its config, every number against its digest.

What was saved by quantforge carries digests (`quantforge.digests`), against which its dequantized layers, its other
tensors and its files are held. Checkpoints of others are checked as far as their own files and the rules of their
loaders go.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantforge import digests, stored
from quantforge.errors import ModelError
from quantforge.exporters import gguf
from quantforge.models.folder import contained
from quantforge.models.headers import show
from quantforge.numerics.problem import QWeight
from quantforge.store import MARK
from quantforge.verification import loaders, parts, rules
from quantforge.verification.report import Finding, Loader, Report, noting

__all__ = ["Finding", "Loader", "Report", "require", "verify"]
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def verify(folder: str | Path, *, trust_remote_code: bool = False) -> Report:
    """Open a checkpoint and tell what is wrong with it, and which loaders will take it.

    Nothing is raised for a damaged checkpoint: each fault is a finding, named with its file, tensor or key.
    """
    folder, findings = Path(folder), list[Finding]()
    kept = _read_digests(folder, findings)
    if kept is not None and os.path.isdir(folder):
        _check_files(folder, kept["files"], findings)
    opened: stored.Stored | None = None
    with noting(findings), stored.as_damage(folder):
        opened = stored.open_folder(folder, trust_remote_code=trust_remote_code)
    if opened is None:
        return Report(folder, None, 0, 0, kept is not None, tuple(findings), ())
    report = Report(folder, opened.container, 0, 0, kept is not None, (), ())
    findings += rules.check_keys(opened.container, opened.quantization)
    facts, count = dict[str, loaders.Layer](), 0
    with noting(findings), stored.as_damage(folder):
        facts, count = _check_content(opened, kept, findings)
    _check_tokenizer(folder, findings)
    whole = replace(report, layers=len(facts), tensors=count, findings=tuple(findings))
    if not whole.sound:
        return whole
    judged = loaders.judge(opened.container, opened.quantization, facts, adapter=parts.has_adapter(opened))
    return replace(whole, loaders=judged)


def require(folder: Path, shown: Path | None = None, *, trust_remote_code: bool = False) -> Report:
    """Return the report of a sound checkpoint; ModelError with its first fault for another one.

    shown  what errors call the folder, where it is to be moved there
    """
    report = verify(folder, trust_remote_code=trust_remote_code)
    if not report.sound:
        first, more = report.faults[0], len(report.faults) - 1
        also = f" ({more} more faults)" if more else ""
        message = f"{folder} is not what was to be written: {first.message.rstrip('.')}{also}."
        raise ModelError(348, message.replace(str(folder), str(shown or folder)))
    return report


def _read_digests(folder: Path, findings: list[Finding]) -> dict[str, Any] | None:
    """Return the digests that were recorded when the checkpoint was saved; None if there are none that can be used."""
    if not os.path.lexists(folder / MARK):
        findings.append(Finding(f"there is no {MARK}, so there are no digests to compare with."))
        return None
    with noting(findings):
        record = stored.read_record(folder)
        kept = record.get("digests")
        if kept is None:
            findings.append(Finding(f"{MARK} was written without digests, so there are none to compare with."))
            return None
        tables = [kept.get(key) for key in digests.KEYS[:3]] if isinstance(kept, dict) else []
        if not tables or not all(isinstance(t, dict) and all(map(_is_text, t.values())) for t in tables):
            raise ModelError(348, f"{MARK}: digests are no tables of texts; it was changed after it was saved.")
        if digests.record_digest(record) != kept.get("record"):
            findings.append(Finding(f"{MARK} was changed after it was saved.", 348))
        return dict(kept)
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _check_files(folder: Path, kept: Mapping[str, str], findings: list[Finding]) -> None:
    """Compare every file with its digest; what was added is only a note."""
    present = set(digests.names_of_files(folder))
    for name in sorted(set(kept) - present):
        findings.append(Finding(f"{show(name)} is missing, which was saved with the checkpoint.", 348))
    for name in sorted(present):
        if name not in kept:
            findings.append(Finding(f"{show(name)} was not saved with the checkpoint."))
            continue
        with noting(findings):
            if digests.file_digest(contained(folder, name, Path(name).suffix)) != kept[name]:
                findings.append(Finding(f"{show(name)} was changed after it was saved.", 348))


def _check_tokenizer(folder: Path, findings: list[Finding]) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        findings.append(Finding("there is no tokenizer; loaders will read token ids only."))


def _check_content(
    opened: stored.Stored, kept: Mapping[str, Any] | None, findings: list[Finding]
) -> tuple[dict[str, loaders.Layer], int]:
    """Check config and tensors against each other, and what they come to.

    Returns what loaders look at in each layer that was read, and how many tensors there are.
    """
    if opened.container == "gguf":
        return _check_gguf(opened, kept, findings)
    found, config = parts.sort_out(opened), opened.quantization
    readable = parts.check_config(opened, findings)
    if opened.container == "compressed-tensors":
        findings += rules.check_targets(config, found.files)
    findings += parts.check_told(found, rules.told(opened.container, config, found.files))
    parts.check_others(opened, found, findings)
    if kept is not None:
        others = {name: (info.file.name, digests.stored_digest(info)) for name, info in found.others.items()}
        _compare_others(others, kept["tensors"], findings)
    count = len(opened.files.tensors)
    if not readable:
        return {}, count
    facts = _check_layers(opened, found, None if kept is None else kept["layers"], findings)
    findings += rules.check_kinds(opened.container, config, (layer.format for layer in facts.values()))
    return facts, count


def _check_gguf(
    opened: stored.Stored, kept: Mapping[str, Any] | None, findings: list[Finding]
) -> tuple[dict[str, loaders.Layer], int]:
    """Do the same for a folder whose weights stand in one GGUF file, which its own reader checks."""
    layers, tensors = stored.read_layers(opened)
    parts.check_whole(opened, layers, tensors, findings)
    if kept is not None:
        for name, weight in layers.items():
            _compare_layer(name, weight, kept["layers"], findings)
        findings += _absent(kept["layers"], layers)
        _compare_others({n: (gguf.FILE, d) for n, d in digests.wide(tensors).items()}, kept["tensors"], findings)
    return {name: loaders.facts(weight) for name, weight in layers.items()}, len(layers) + len(tensors)


def _absent(kept: Mapping[str, str], found: Collection[str]) -> list[Finding]:
    return [
        Finding(f"{show(name)} is not quantized here, and was when the checkpoint was saved.", 348)
        for name in sorted(set(kept) - set(found))
    ]


def _check_layers(
    opened: stored.Stored, found: parts.Parts, kept: Mapping[str, str] | None, findings: list[Finding]
) -> dict[str, loaders.Layer]:
    """Read one layer after the other and compare each with its digest; return what loaders look at in those read."""
    facts, factors = {}, parts.read_adapter(opened, found, findings)
    for name in found.held:
        weight = parts.read_layer(opened, name, found, findings)
        with noting(findings):
            if weight is not None and name in factors:
                weight = stored.corrected(opened.files.path, name, weight, factors[name])
        if weight is not None:
            facts[name] = loaders.facts(weight)
            if kept is not None:
                _compare_layer(name, weight, kept, findings)
    findings += _absent(kept or {}, found.held)
    return facts


def _compare_layer(name: str, weight: QWeight, kept: Mapping[str, str], findings: list[Finding]) -> None:
    digest = digests.layer_digest(weight)
    if digest == kept.get(name):
        return
    twin = next((other for other, value in kept.items() if value == digest), None)
    what = f"holds the numbers of {show(twin)}" if twin else "has other numbers than were saved"
    findings.append(Finding(f"{name} {what}.", 348))


def _compare_others(others: Mapping[str, tuple[str, str]], kept: Mapping[str, str], findings: list[Finding]) -> None:
    """Compare what belongs to no quantized layer: name → (file, digest)."""
    for name, (file, digest) in others.items():
        if name not in kept:
            findings.append(Finding(f"{file}: {show(name)} was not there when the checkpoint was saved.", 348))
        elif digest != kept[name]:
            findings.append(Finding(f"{file}: {show(name)} has other numbers than were saved.", 348))
    for name in sorted(set(kept) - set(others)):
        findings.append(Finding(f"{show(name)} is missing, which was saved with the checkpoint.", 348))
