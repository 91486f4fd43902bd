"""Telling a Trainer's checkpoint that was written to its end from one that was not.

The Trainer writes checkpoints in place and believes the highest number. ``ArmCallback`` puts a marker into each one as
the last file, with the sizes of all others, and refuses to go on from a checkpoint without it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import CheckpointError
from .atomic import write_atomically
from .overrides import accepted

MARKER = "sapt_complete.json"
MAX_MARKER = 2**20
LATER = re.compile(  # may still be written by other processes, or change without harm
    rf"{re.escape(MARKER)}|rng_state_\d+\.pth|README\.md|attention\.png"
)


def mark(folder: str | os.PathLike) -> None:
    """Say that everything that is in the checkpoint ``folder`` now is all of it."""
    folder = Path(folder)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    sizes = {path.name: path.stat().st_size for path in files if not LATER.fullmatch(path.name)}
    write_atomically(folder / MARKER, (json.dumps(sizes, indent=1) + "\n").encode())


def fault_of(folder: str | os.PathLike) -> str | None:
    """Why the checkpoint in ``folder`` cannot be trusted; None if it is complete."""
    path = Path(folder) / MARKER
    try:
        if path.stat().st_size > MAX_MARKER:
            return f"its {MARKER} is too large"
        sizes = json.loads(path.read_bytes())
    except FileNotFoundError:
        return f"it has no {MARKER}, so it was not written to its end"
    except (RecursionError, ValueError):
        return f"its {MARKER} is not JSON"
    if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
        return f"its {MARKER} lists no sizes"
    for name, size in sizes.items():
        file = path.parent / Path(name).name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} has {found} bytes in place of {size}" if found is not None else f"{name} is missing"
    return None


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """Folders of checkpoints in ``output_dir``, by their number."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in ``output_dir`` that was written to its end, for ``train(resume_from_checkpoint=...)``.

    None if there is none, with which the Trainer begins again.
    """
    return next((str(path) for path in reversed(checkpoints_in(output_dir)) if fault_of(path) is None), None)


def refuse_incomplete(folder: str | os.PathLike) -> None:
    """Check the checkpoint in ``folder``, from which a Trainer goes on.

    Raises:
        CheckpointError: it was not written to its end.
    """
    fault = fault_of(folder)
    if fault is not None and not accepted("unmarked_checkpoint"):
        better = last_complete_checkpoint(Path(folder).parent)
        cure = f"resume from {better}" if better is not None else "there is no complete one beside it, so begin again"
        raise CheckpointError(
            f"{folder} is incomplete: {fault}. Do not use it: {cure} (peft_sapt.last_complete_checkpoint(output_dir) "
            "finds one). `with peft_sapt.accept('unmarked_checkpoint'):` goes on from it all the same."
        )
