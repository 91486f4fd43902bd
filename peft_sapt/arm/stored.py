"""A task's generator in a folder: a plain LoRA adapter, and beside it what drawing from it needs.

The folder works without this package too: load the adapter with PEFT and continue the tokens ``start``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ReflectionError
from ..storage.atomic import read_bounded, write_atomically
from .generator import TASK
from .processes import is_first_process

FILE = "generator.json"


@dataclass
class Drawing:
    """How rows are drawn from a generator: ``start`` is what it continues, ``end`` what ends a row, ``closing`` what
    is put behind one; a row has at most ``longest`` tokens. ``known`` are digests of the training prompts, which tell
    a verbatim copy without the prompts (whoever can guess a prompt can check the guess against them)."""

    start: list[int]
    end: int
    closing: list[int]
    longest: int
    known: list[str]
    block: str | None = None  # digest of the block that the task has learned; None in older folders


def write_generator(folder: str | os.PathLike, model: Any, drawing: Drawing) -> None:
    """Write the active generator of ``model``; of several processes the first one does."""
    if not is_first_process():
        return
    model.export_task(TASK, folder)
    write_atomically(Path(folder) / FILE, (json.dumps(asdict(drawing)) + "\n").encode())


def read_drawing(folder: str | os.PathLike) -> Drawing:
    """What [`write_generator`] wrote beside the adapter.

    Raises:
        ReflectionError: the file is missing or damaged.
    """
    path = Path(folder) / FILE
    try:
        values = json.loads(read_bounded(path))
        drawing = Drawing(**values)
    except FileNotFoundError:
        raise ReflectionError(
            f"{path} is missing: give the generator_folder that ArmCallback wrote, or train the task again with one."
        ) from None
    except (RecursionError, TypeError, ValueError) as error:
        raise ReflectionError(f"{path} does not describe a generator ({error}).") from error
    numbers = [*drawing.start, *drawing.closing, drawing.end, drawing.longest] if _lists(drawing) else [None]
    if not all(type(value) is int and value >= 0 for value in numbers) or not drawing.start or not drawing.longest:
        raise ReflectionError(f"{path} does not describe a generator: start, end, closing and longest are token ids.")
    return drawing


def _lists(drawing: Drawing) -> bool:
    return all(isinstance(value, list) for value in (drawing.start, drawing.closing, drawing.known))
