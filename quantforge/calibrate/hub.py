"""Text sets on the Hugging Face hub, loaded through `datasets`: the only text that quantforge takes from a network.

No code from the hub is ever run: `datasets` gets no leave for it, and the sets are plain parquet and JSON files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from quantforge.errors import DataError
from quantforge.network import reachable


@dataclass(frozen=True)
class HubText:
    """A definition with `source: hub`: which rows of which repository, and how they become one text.

    repository     owner/name on the hub
    split, field   the split, and the column that holds the text of a document
    join           what stands between two documents
    configuration  the repository's named configuration, if it has several
    file           read this one file of the repository only
    revision       branch or commit; None is the default branch
    documents      take the first so many documents; None takes all
    windows        the protocol scores at most so many windows; None is all of them
    """

    about: str
    licence: str
    repository: str
    split: str
    field: str
    join: str
    configuration: str | None = None
    file: str | None = None
    revision: str | None = None
    documents: int | None = None
    windows: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would make `datasets` read something else than a repository of the hub, or nothing."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.repository):
            raise ValueError(f"repository must be owner/name, not {self.repository!r}")
        for key, value in (("documents", self.documents), ("windows", self.windows)):
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")


def load(name: str, spec: HubText, offline_names: list[str]) -> tuple[str, str]:
    """Return (text, one line on its source) of the set `name`; errors suggest `offline_names` instead.

    With HF_HUB_OFFLINE set only the local cache of `datasets` is read. Raises DataError: no network (within 10
    seconds), `datasets` not installed, or a repository that does not hold what `spec` says.
    """
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise DataError(
            410, f"{name!r} needs the package 'datasets': pip install datasets, or use {_instead(offline_names)}."
        ) from error
    if Path(spec.repository).exists():
        # `datasets` prefers a folder of that name to the hub
        raise DataError(411, f"{name!r}: ./{spec.repository} stands in the way of the hub's: work from another folder.")
    offline = bool(constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)
    if not offline and not reachable():
        raise DataError(
            412,
            f"{name!r} is on the Hugging Face hub, and {constants.ENDPOINT} cannot be reached: use "
            f"{_instead(offline_names)}; HF_HUB_OFFLINE=1 reads a set that was loaded before from the local cache.",
        )
    files = {spec.split: spec.file} if spec.file else None
    try:
        rows = datasets.load_dataset(
            spec.repository, spec.configuration, data_files=files, revision=spec.revision, split=spec.split
        )
        columns = list(rows.column_names)
        documents = list(rows[: spec.documents][spec.field]) if spec.field in columns else []
    except Exception as error:  # many libraries deep: what they raise is no interface
        if offline:
            raise DataError(
                413,
                f"{name!r}: HF_HUB_OFFLINE is set and the local cache has no copy that can be read "
                f"({_line(error)}): use {_instead(offline_names)}.",
            ) from error
        raise DataError(414, f"{name!r} cannot be loaded from {spec.repository}: {_line(error)}") from error
    if spec.field not in columns:
        raise DataError(415, f"{name!r}: {spec.repository} has no column {spec.field!r}; it has: {', '.join(columns)}.")
    for i, document in enumerate(documents):
        if not isinstance(document, str):
            raise DataError(415, f"{name!r}: row {i} of {spec.repository} holds no text but {type(document).__name__}.")
    return spec.join.join(documents), _source(spec, len(documents))


def _instead(offline_names: list[str]) -> str:
    return f"{', '.join(offline_names)} or any .txt or .jsonl file, which need no network"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _source(spec: HubText, count: int) -> str:
    place = [spec.repository, spec.configuration, spec.file, spec.revision and f"revision {spec.revision}"]
    return f"{' '.join(p for p in place if p)}, split {spec.split}, {count} documents, from the Hugging Face hub"
