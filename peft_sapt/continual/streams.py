"""Streams of tasks: rows of text by task and split, in the order in which the tasks are learned."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import StreamError

Row = dict[str, Any]
Stream = dict[str, dict[str, list[Row]]]
SPLITS = ("train", "validation", "test")


def load_folder(folder: Path, order: list[str] | None = None) -> Stream:
    """Tasks of ``folder`` (``<task>.{train,validation,test}.jsonl[.gz]``) in ``order``, by default alphabetical.

    Each row has ``instruction``, ``input`` and ``output``, a text or a list of accepted ones.

    Raises:
        StreamError: a task or split is missing; the message lists what is there.
    """
    files = {path.name.split(".jsonl")[0]: path for path in folder.glob("*.jsonl*")}
    known = sorted({name.rsplit(".", 1)[0] for name in files})
    wanted = known if order is None else order
    missing = [f"{name}.{split}" for name in wanted for split in SPLITS if f"{name}.{split}" not in files]
    if missing or not wanted:
        raise StreamError(f"{folder} lacks {missing or 'any task'}; tasks there: {known}. Check folder and order.")
    return {name: {split: _read(files[f"{name}.{split}"]) for split in SPLITS} for name in wanted}


def _read(path: Path) -> list[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream if line.strip()]
    return [{**row, "output": row["output"] if isinstance(row["output"], list) else [row["output"]]} for row in rows]


def fingerprint(stream: Stream) -> str:
    """SHA-256 of everything in ``stream``, whatever the order of its tasks."""
    text = json.dumps(stream, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
