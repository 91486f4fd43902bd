"""save_pool: everything or nothing, on full disks, in read-only folders, and with several writers."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers.committed import pool_of
from helpers.paths import PATHS
from helpers.tiny import build_pool
from peft_sapt import SaptConfig, locked, save_pool
from peft_sapt.errors import ChangedTensorError, ConfigFileError, PickleError, SaptError, SaveError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def listed(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".peft-sapt.lock")


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listed(folder)}


def test_it_writes_what_save_pretrained_writes(tmp_path) -> None:
    model = pool_of()
    save_pool(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "bare")
    assert content(tmp_path / "ours") == content(tmp_path / "bare")


def test_a_second_adapter_is_saved_as_a_pool_of_its_own(tmp_path) -> None:
    model = pool_of()
    model.add_adapter("other", build_pool("llama", ["x", "y"]).peft_config["default"])
    model.set_adapter("other")
    save_pool(model, tmp_path)
    assert listed(tmp_path)[:3] == ["README.md", CONFIG, WEIGHTS]
    with torch.no_grad():
        assert PeftModel.from_pretrained(pool_of().unload(), tmp_path).tasks == ["x", "y"]


class Arm:
    """Has drawn pseudo-samples of one task."""

    def save_replay(self, folder) -> None:
        (folder / "replay").mkdir(exist_ok=True)
        (folder / "replay" / "b.jsonl").write_text("new\n")


def test_texts_of_tasks_that_stay_are_kept(tmp_path) -> None:
    save_pool(pool_of(3), tmp_path)
    (tmp_path / "replay").mkdir()
    for name in ("a", "b", "c", "my_own_rows"):
        (tmp_path / "replay" / f"{name}.jsonl").write_text("old\n")
    save_pool(pool_of(2), tmp_path, Arm())
    found = {p.stem: p.read_text() for p in (tmp_path / "replay").glob("*.jsonl")}
    assert found == {"a": "old\n", "b": "new\n", "my_own_rows": "old\n"}, "c alone is no longer in the pool"
    save_pool(pool_of(2), tmp_path)
    assert "`replay/` holds the text" in (tmp_path / "README.md").read_text(), (
        "the texts are there, so the card says so"
    )


def test_a_writer_that_fails_leaves_what_another_has_just_written(tmp_path, monkeypatch) -> None:
    """Both began when there was no folder."""
    model, save = pool_of(3), pool_of(2).save_pretrained
    target = tmp_path / "new"

    def overtaken(folder, **kwargs) -> None:
        save(target)  # the other one, which is done by now
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model, "save_pretrained", overtaken)
    with pytest.raises(SaveError, match="No space left"):
        save_pool(model, target)
    assert PeftModel.from_pretrained(pool_of().unload(), target).tasks == ["a", "b"]


def test_a_damaged_pool_can_be_overwritten(tmp_path) -> None:
    model = pool_of(2)
    for save in (model.save_pretrained, lambda folder: save_pool(model, folder)):
        model.save_pretrained(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(b"broken")
        save(tmp_path)
        assert PeftModel.from_pretrained(pool_of().unload(), tmp_path).tasks == ["a", "b"]


def test_what_does_not_read_back_is_not_published(tmp_path, monkeypatch) -> None:
    save_pool(pool_of(2), tmp_path)
    before, model = content(tmp_path), pool_of(3)
    save = model.save_pretrained

    def spoiled(folder, **kwargs) -> None:
        save(folder, **kwargs)
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte of the first tensor
        (folder / WEIGHTS).write_bytes(data)

    monkeypatch.setattr(model, "save_pretrained", spoiled)
    with pytest.raises(ChangedTensorError, match="check the disk"):
        save_pool(model, tmp_path)
    assert content(tmp_path) == before


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch, after: int) -> None:
    """ENOSPC at the n-th flush of a file: weights, config, card, picture."""
    save_pool(pool_of(2), tmp_path)
    before, calls, fsync = content(tmp_path), [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=rf"{tmp_path.name} cannot be written: No space left on device.*intact"):
        save_pool(pool_of(3), tmp_path)
    monkeypatch.undo()
    assert content(tmp_path) == before


def test_a_limit_of_the_file_size(tmp_path) -> None:
    """RLIMIT_FSIZE makes the write of the weights itself fail, within safetensors."""
    save_pool(pool_of(2), tmp_path / "old")
    before = content(tmp_path / "old")
    context = multiprocessing.get_context("fork")

    def limited(target: Path, sending) -> None:
        import signal

        torch.set_num_threads(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_pool(pool_of(3), target)
        except SaveError as error:
            sending.send(str(error))

    for target in (tmp_path / "old", tmp_path / "new"):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=limited, args=(target, sending))
        process.start()
        process.join(60)
        assert receiving.poll(), "the save did not fail"
        message = receiving.recv()
        assert str(target) in message and "cannot be written" in message
    assert content(tmp_path / "old") == before and not (tmp_path / "new").exists()


def can_mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_a_file_system_that_is_full(tmp_path) -> None:
    """A tmpfs with room for one pool alone. Where none may be mounted, the tests above stand for it."""
    if not can_mount(tmp_path):
        return
    try:
        save_pool(pool_of(2), tmp_path / "pool")
        before = content(tmp_path / "pool")
        (tmp_path / "filler").write_bytes(b"x" * (shutil.disk_usage(tmp_path).free - 40_000))
        with pytest.raises(SaveError, match="cannot be written"):
            save_pool(pool_of(3), tmp_path / "pool")
        assert content(tmp_path / "pool") == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=False)


def test_a_folder_that_may_not_be_written(tmp_path) -> None:
    """As a user without rights; root may write everywhere."""
    save_pool(pool_of(2), tmp_path / "old")
    before = content(tmp_path / "old")
    script = (
        "import os, sys; sys.path[:0] = sys.argv[2:]\n"
        "from helpers.committed import pool_of\nfrom peft_sapt import save_pool\n"
        "from peft_sapt.errors import SaveError\nmodel = pool_of(3)\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: save_pool(model, sys.argv[1])\n"
        "except SaveError as error: print(error)"
    )
    for path in (tmp_path / "old", *(tmp_path / "old").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == Path.home().owner() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    command = [sys.executable, "-c", script, str(tmp_path / "old"), *PATHS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert f"{tmp_path / 'old'} cannot be written: Permission denied" in done.stdout, done.stderr[-2000:]
    assert content(tmp_path / "old") == before


# --- several processes -----------------------------------------------------------------------------------------------


def writer(folder: Path, tasks: int, times: int) -> None:
    torch.set_num_threads(1)
    model = pool_of(tasks)
    for _ in range(times):
        save_pool(model, folder)


def test_two_writers_and_a_reader(tmp_path) -> None:
    """The reader, who takes the lock, always finds one of the two pools, whole."""
    context = multiprocessing.get_context("fork")
    states = {2: pool_of(2), 3: pool_of(3)}
    save_pool(states[2], tmp_path)
    writers = [context.Process(target=writer, args=(tmp_path, tasks, 15)) for tasks in (2, 3)]
    for process in writers:
        process.start()
    seen = set()
    while any(process.is_alive() for process in writers):
        with locked(tmp_path), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = PeftModel.from_pretrained(pool_of().unload(), tmp_path)
        known = states[len(found.tasks)]
        for name in known.tasks:
            assert all(torch.equal(t, found.task_state(name)[k]) for k, t in known.task_state(name).items())
        seen.add(len(found.tasks))
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert seen and not list(tmp_path.glob(".saving-*"))


def test_a_lock_that_is_not_let_go(tmp_path) -> None:
    with locked(tmp_path), pytest.raises(SaveError, match=r"locked by another process for 0.1 s"):
        save_pool(pool_of(), tmp_path, timeout=0.1)


# --- what an interrupted save leaves ---------------------------------------------------------------------------------


def test_weights_and_config_of_different_saves(tmp_path) -> None:
    """Killed between the two files: the weights decide, whichever is the older."""
    for old, new in ((2, 3), (3, 2)):
        folder = tmp_path / f"{old}{new}"
        pool_of(old).save_pretrained(folder)
        config = (folder / CONFIG).read_bytes()
        pool_of(new).save_pretrained(folder)
        (folder / CONFIG).write_bytes(config)
        with pytest.warns(UserWarning, match=r"of another save.*the weights decide"):
            model = PeftModel.from_pretrained(pool_of().unload(), folder)
        assert len(model.tasks) == new
        save_pool(model, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            PeftModel.from_pretrained(pool_of().unload(), folder)


def test_settings_that_a_user_edits_count(tmp_path) -> None:
    pool_of(2).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "top_k": 1, "min_weight": 0.25}))
    config = PeftModel.from_pretrained(pool_of().unload(), tmp_path).peft_config["default"]
    assert (config.top_k, config.min_weight) == (1, 0.25)


def test_settings_that_are_saved_beside_weights_count(tmp_path) -> None:
    model = pool_of(2)
    model.save_pretrained(tmp_path)
    edited = SaptConfig.from_pretrained(tmp_path)
    for config, top_k in ((edited, 1), (model.peft_config["default"], 2)):
        config.top_k = top_k
        config.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert PeftModel.from_pretrained(pool_of().unload(), tmp_path).peft_config["default"].top_k == top_k


def test_the_same_pool_has_the_same_bytes(tmp_path) -> None:
    for name in ("one", "two"):
        save_pool(pool_of(3), tmp_path / name)
    PeftModel.from_pretrained(pool_of().unload(), tmp_path / "one").save_pretrained(tmp_path / "three")
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two", "three")]
    assert all(torch.equal(files[0][key], other[key]) for other in files[1:] for key in files[0])


def test_pickles_are_neither_written_nor_read(tmp_path) -> None:
    with pytest.raises(SaveError, match="without safe_serialization=False"):
        pool_of(2).save_pretrained(tmp_path, safe_serialization=False)
    pool_of(2).save_pretrained(tmp_path / "whole")
    with pytest.raises(SaveError, match="without safe_serialization=False"):
        pool_of(2).save_pretrained(tmp_path / "whole", safe_serialization=False)
    (tmp_path / "whole/adapter_model.bin").unlink()
    shutil.copy(tmp_path / "whole" / CONFIG, tmp_path)
    with pytest.raises(PickleError, match=r"adapter_model.bin, a pickle"):
        PeftModel.from_pretrained(pool_of().unload(), tmp_path)


NO_POOLS = ["{", "[]", '{"peft_type": "SAPT", "tasks": 3}', '{"peft_type": "SAPT", "r": "x"}', " " * 9_000_000]


@pytest.mark.parametrize("text", NO_POOLS, ids=range(len(NO_POOLS)))
def test_a_config_that_describes_no_pool(tmp_path, text: str) -> None:
    pool_of(2).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(SaptError) as caught:
        SaptConfig.from_pretrained(tmp_path)
    assert isinstance(caught.value, ConfigFileError) == ("SAPT" not in text)
