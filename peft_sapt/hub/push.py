"""Pushing the folder of a saved pool: what has changed, in one commit, and nothing else."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.hf_api import RepoFile
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..errors import PoolFormatError
from .card import PICTURE, around, refresh_card

CARD = "README.md"
POOL_FILES = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, CARD, PICTURE, "replay/")  # what a pool's folder consists of


@dataclass(frozen=True)
class Push:
    """What a push did: paths by what became of them, the bytes of the files sent, and the commit's address.

    Storage that knows a part of a file already (the Hub's is chunked) may have moved fewer bytes than ``sent_bytes``.
    """

    sent: list[str]
    unchanged: list[str]
    deleted: list[str]
    sent_bytes: int
    url: str


def push_folder(
    folder: Path, repo_id: str, *, private: bool | None = None, message: str = "Upload SAPT pool", **api: Any
) -> Push:
    """Bring ``repo_id`` on the Hub to the state of the pool saved in ``folder``, in at most one commit.

    Files of the pool that are the same there are not sent, pseudo-samples and pictures that are no longer here are
    deleted, and files that are not the pool's are left alone on both sides. The card keeps the words that a user wrote
    around our section, here or, if nobody did here, on the Hub.

    Args:
        api: ``token`` and ``endpoint`` of [`huggingface_hub.HfApi`].

    Raises:
        PoolFormatError: ``folder`` holds no pool, or a link out of it.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    missing = [name for name in POOL_FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise PoolFormatError(f"{folder} holds no {missing[0]}: give the folder of a saved pool.")
    for name in own_files(folder):
        refuse_link_outside(folder / name, folder)
    hub = HfApi(**api)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    there = {file.path: file for file in files_of(hub, repo_id)}
    with tempfile.TemporaryDirectory() as staging:
        card = staged_card(folder, Path(staging), hub, repo_id, CARD in there)
        here = {path: folder / path for path in own_files(folder)} | {CARD: card}
        sent = sorted(path for path, local in here.items() if path not in there or differs(local, there[path]))
        deleted = sorted(path for path in there if path.startswith(POOL_FILES[3:]) and path not in here)
        size = sum(here[path].stat().st_size for path in sent)
        url = f"{hub.endpoint}/{repo_id}"
        if sent or deleted:
            adding = [CommitOperationAdd(path, here[path]) for path in sent]
            removing = [CommitOperationDelete(path) for path in deleted]
            url = hub.create_commit(repo_id, [*adding, *removing], commit_message=message).commit_url
    return Push(sent, sorted(set(here) - set(sent)), deleted, size, url)


def files_of(hub: HfApi, repo_id: str) -> Iterable[RepoFile]:
    return (entry for entry in hub.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile))


def refuse_link_outside(path: Path, folder: Path) -> None:
    """Raises [`PoolFormatError`] if ``path`` is a link to what is neither in ``folder`` nor in a cache of the Hub."""
    target, root = path.resolve(), folder.resolve()
    # the Hub's cache has snapshots/<revision>/... as links into blobs/ beside it
    above = next((path.parent for path in [root, *root.parents] if path.name == "snapshots"), None)
    cache = root if above is None else above / "blobs"
    if not target.is_relative_to(root) and not target.is_relative_to(cache):
        raise PoolFormatError(f"{path} is a link to {target}, outside of the pool's folder: it is not pushed.")


def own_files(folder: Path) -> list[str]:
    """Paths in ``folder`` that belong to a pool."""
    found = [name for name in POOL_FILES[:4] if (folder / name).is_file()]
    return found + sorted(f"replay/{path.name}" for path in (folder / "replay").glob("*.jsonl"))


def staged_card(folder: Path, staging: Path, hub: HfApi, repo_id: str, on_hub: bool) -> Path:
    """The card to push, in ``staging``, beside what it is written from."""
    for name in own_files(folder):
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, staging / name)
    card = staging / CARD
    silent = not card.is_file() or not any(around(ModelCard(card.read_text(encoding="utf-8")).text))
    if silent and on_hub:
        shutil.copyfile(hub.hf_hub_download(repo_id, CARD, local_dir=staging / "hub"), card)
    refresh_card(staging, repo_id)
    return card


def differs(local: Path, remote: RepoFile) -> bool:
    """Whether the bytes at ``local`` are others than those of ``remote``, by size and by hash."""
    if local.stat().st_size != remote.size:
        return True
    if remote.lfs is not None:
        with local.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() != remote.lfs.sha256
    data = local.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != remote.blob_id
