"""Streams of tasks: rows of text by task and split, in the order in which the tasks are learned.

A row has ``instruction``, ``input`` and ``output``, the accepted answers; a stream comes from a folder of JSONL, from
``datasets``, or from Python objects.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import StreamError

Row = dict[str, Any]
Stream = dict[str, dict[str, list[Row]]]
SPLITS = ("train", "validation", "test")
MAX_LINE = 2**24  # characters of one row


def load_folder(folder: Path, order: list[str] | None = None) -> Stream:
    """Tasks of ``folder`` (``<task>.{train,validation,test}.jsonl[.gz]``) in ``order``, by default alphabetical.

    Raises:
        StreamError: a task or split is missing (the message lists what is there), or a row is malformed (it names file
            and line).
    """
    files = files_of(folder)
    known = tasks_of(folder)
    wanted = known if order is None else order
    missing = [f"{name}.{split}" for name in wanted for split in SPLITS if f"{name}.{split}" not in files]
    if missing or not wanted:
        raise StreamError(f"{folder} lacks {missing or 'any task'}; tasks there: {known}. Check folder and order.")
    return {name: {split: _read(files[f"{name}.{split}"]) for split in SPLITS} for name in wanted}


def files_of(folder: Path) -> dict[str, Path]:
    """Path by ``<task>.<split>``; raises [`StreamError`] if there is no such folder."""
    if not folder.is_dir():
        raise StreamError(f"There is no folder {folder}: give one that holds <task>.train.jsonl[.gz] and so on.")
    return {path.name.split(".jsonl")[0]: path for path in folder.glob("*.jsonl*")}


def tasks_of(folder: Path) -> list[str]:
    """Names of the tasks in ``folder``, sorted."""
    return sorted({name.rsplit(".", 1)[0] for name in files_of(folder)})


def load_dataset_stream(path: str, order: list[str] | None = None) -> Stream:
    """Tasks of a dataset on the Hub (or a local one), one configuration a task, through ``datasets.load_dataset``.

    Args:
        order: names of configurations; all of them by default.

    Raises:
        StreamError: a configuration, split or column is missing.
    """
    import datasets

    names = datasets.get_dataset_config_names(path)
    missing = [name for name in order or names if name not in names]
    if missing:
        raise StreamError(f"Dataset {path!r} has no configuration {missing}: it has {names}.")
    return from_splits({name: datasets.load_dataset(path, name) for name in order or names})


def from_splits(
    tasks: Mapping[str, Mapping[str, Iterable[Mapping[str, Any]]]],
    *,
    instruction: str = "instruction",
    input: str = "input",
    output: str = "output",
) -> Stream:
    """A stream from Python objects or ``DatasetDict``s: rows by task and split, oldest task first.

    Args:
        instruction, input, output: columns that hold them; ``instruction`` may be missing, ``output`` is a text or a
            list of accepted ones.

    Raises:
        StreamError: a split is missing, or a row lacks a column.
    """
    columns = {"instruction": instruction, "input": input, "output": output}
    stream: Stream = {}
    for name, splits in tasks.items():
        missing = [split for split in SPLITS if split not in splits]
        if missing:
            raise StreamError(f"Task {name!r} has no split {missing}: it has {list(splits)}.")
        stream[name] = {
            split: [
                checked({own: row[theirs] for own, theirs in columns.items() if theirs in row}, f"{name}.{split}[{i}]")
                for i, row in enumerate(splits[split])
            ]
            for split in SPLITS
        }
    return stream


def _read(path: Path) -> list[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(bounded(lines), start=1):
                if line.strip():
                    rows.append(checked(json.loads(line), f"{path}:{number}"))
    except StreamError:  # which is a ValueError
        raise
    except (json.JSONDecodeError, RecursionError) as error:
        raise StreamError(f"{path}:{number} is not JSON ({error}): each line must be one object.") from error
    except (OSError, EOFError, UnicodeDecodeError, ValueError, zlib.error) as error:
        raise StreamError(f"{path} cannot be read: {error}.") from error
    if not rows:
        raise StreamError(f"{path} holds no row.")
    return rows


def bounded(lines: IO[str]) -> Iterator[str]:
    """Lines of a file, none longer than ``MAX_LINE`` characters, however much a compressed one would give."""
    while line := lines.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"a line is longer than {MAX_LINE} characters")
        yield line


def checked(row: Any, where: str) -> Row:
    """``row`` with a list of outputs and an instruction; raises [`StreamError`] if it has no input or no output."""
    if not isinstance(row, Mapping) or "input" not in row or is_empty(row.get("output")):
        raise StreamError(f'{where} lacks "input" or "output": it is {str(row)[:120]}.')
    output = row["output"]
    return {
        **row,
        "instruction": row.get("instruction") or "",
        "output": output if isinstance(output, list) else [output],
    }


def is_empty(output: Any) -> bool:
    """Whether there is no answer; a label of 0 is one."""
    return output is None or (hasattr(output, "__len__") and len(output) == 0)


def fingerprint(stream: Stream) -> str:
    """SHA-256 of everything in ``stream``, whatever the order of its tasks."""
    text = json.dumps(stream, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
