"""Saving a pool so that a reader sees the old one or the new one, whatever happens in between.

``save_pretrained`` of PEFT writes straight to the folder; a load then still finds the state before or after, since the
weights file describes the whole pool and decides. This module adds what PEFT leaves out: everything is written beside
first, read back, flushed to the disk, and then renamed, under a lock that keeps other writers out.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ChangedTensorError, SaveError
from ..hub.card import PICTURE, refresh_card
from ..storage.manifest import digest, read_manifest
from ..storage.plain_file import differences, is_manifest, opened
from ..storage.replay_rows import digests, note_rows, noted_rows, stored_replay

LOCK, STAGING, REPLAY = ".peft-sapt.lock", ".saving-", "replay"


@contextmanager
def locked(folder: str | os.PathLike, timeout: float = 600.0) -> Iterator[None]:
    """Keep other writers (and readers that ask) out of ``folder``; of this machine, or of a file system with locks.

    Raises:
        SaveError: the folder stayed locked for ``timeout`` seconds.
    """
    try:
        with FileLock(Path(folder) / LOCK, timeout=timeout, mode=0o666):
            yield
    except Timeout:
        raise SaveError(
            f"{folder} has been locked by another process for {timeout:g} s: wait for it, or save elsewhere."
        ) from None


def save_pool(model: Any, folder: str | os.PathLike, arm: Any = None, timeout: float = 600.0) -> None:
    """Save the active pool of ``model``, a [`PeftModel`], to ``folder`` in one step.

    The folder then holds what ``save_pretrained`` writes, and with ``arm`` (an ``ArmCallback``) the text of its
    pseudo-samples. The weights file is replaced first, which commits the save; what is killed before leaves the old
    pool, what is killed after the new one, whose card may be the older one until the next save.

    Args:
        timeout: seconds to wait for another writer.

    Raises:
        SaveError: the disk is full, the folder cannot be written, or another process does not let go of it. What was
            there is intact, and nothing else is left.
    """
    folder = Path(folder)
    if folder.is_file():
        raise SaveError(f"{folder} is a file: save_pool needs a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, timeout):
            for left in folder.glob(f"{STAGING}*"):  # of a writer that was killed: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
            try:
                gone = stage(model, folder, staging, arm)
                publish(staging, folder, gone)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        take_away_if_empty(folder)
        reason = getattr(error, "strerror", None) or error
        raise SaveError(f"{folder} cannot be written: {reason}. What was there is intact.") from error


def foreign_texts(folder: Path, now: Mapping[str, Tensor]) -> set[str]:
    """Tasks of which ``folder`` has a text that stands for other replay rows than ``now``, or for those of no task.

    Whose rows they are is noted beside them, or known by the pool in ``folder``; of other texts nothing is known.
    """
    known, own = {**digests(stored_replay(folder) or {}), **noted_rows(folder / REPLAY)}, digests(now)
    texts = {path.stem for path in (folder / REPLAY).glob("*.jsonl")}
    return {name for name in texts & set(known) if known[name] != own.get(name)}


def take_away_if_empty(folder: Path) -> None:
    """Remove ``folder`` if nothing but our lock is in it."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] in ([], [LOCK]):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def stage(model: Any, folder: Path, staging: Path, arm: Any) -> set[str]:
    """Write the pool to ``staging``, read it back, and flush it to the disk; returns tasks whose texts in ``folder``
    are not this pool's."""
    if is_own_file(folder / "README.md"):
        shutil.copyfile(folder / "README.md", staging / "README.md")  # for what a user wrote there
    adapter = model.base_model.pool.adapter
    model.save_pretrained(staging, selected_adapters=[adapter])
    if adapter != "default":  # PEFT puts others into a folder of their name
        for path in (staging / adapter).iterdir():
            os.replace(path, staging / path.name)
        (staging / adapter).rmdir()
    rows = stored_replay(staging) or {}
    gone = foreign_texts(folder, rows)
    for text in (folder / REPLAY).glob("*.jsonl"):
        if text.stem not in gone and is_own_file(text):
            (staging / REPLAY).mkdir(exist_ok=True)
            shutil.copyfile(text, staging / REPLAY / text.name)
    if (staging / REPLAY).is_dir():
        note_rows(staging / REPLAY, rows)
    refresh_card(staging)  # which speaks of the texts
    if arm is not None:
        arm.save_replay(staging)
    read_back(staging / SAFETENSORS_WEIGHTS_NAME)
    for path in [*files_in(staging), staging]:
        flush(path)
    return gone


def is_own_file(path: Path) -> bool:
    """Whether ``path`` is a file and no link, whose target, whatever it is, would become a part of the pool."""
    return path.is_file() and not path.is_symlink()


def read_back(path: Path) -> None:
    """Raises [`ChangedTensorError`] if the file at ``path`` does not hold what its manifest says."""
    with opened(path) as file:
        names = list(file.keys())
        manifest = read_manifest(file.get_tensor(next(filter(is_manifest, names))))
        missing, _, changed = differences(manifest, ((name, digest(file.get_tensor(name))) for name in names))
    if missing or changed:
        raise ChangedTensorError(
            f"{path} was written, but {(changed or missing)[0]!r} does not read back as it was: check the disk."
        )


def publish(staging: Path, folder: Path, gone: set[str]) -> None:
    """Move what was staged to its place, the weights first; take away what belongs to tasks that are ``gone``."""
    staged = {path.relative_to(staging) for path in files_in(staging)}
    first = [Path(SAFETENSORS_WEIGHTS_NAME), Path(CONFIG_NAME)]
    for path in [*first, *sorted(staged - set(first))]:
        (folder / path).parent.mkdir(exist_ok=True)
        os.replace(staging / path, folder / path)
    if Path(PICTURE) not in staged:
        (folder / PICTURE).unlink(missing_ok=True)
    for path in {Path(REPLAY, f"{name}.jsonl") for name in gone} - staged:
        (folder / path).unlink(missing_ok=True)
    flush(folder)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flush(path: Path) -> None:
    """Have the file or folder at ``path`` on the disk before anything points to it."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # which it asks for before it flushes
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
