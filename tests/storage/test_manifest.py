"""The layout on disk: two files that describe themselves, and a load that refuses what contradicts them."""

from __future__ import annotations

import itertools
import json
import os
import stat

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from helpers.tiny import build_pool, grow, padded, token_rows
from peft_sapt.errors import PoolFormatError
from peft_sapt.storage.atomic import write_atomically
from peft_sapt.storage.manifest import build_manifest, digest, read_manifest
from peft_sapt.storage.plain_file import FORMAT_VERSION

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    model = build_pool("llama", ["a", "b", "c"])
    model.commit_task(inputs=[padded(token_rows([4, 5]))], replay=[padded(token_rows([4, 5, 6]))])
    model.save_pretrained(tmp_path)
    return tmp_path


def manifest_of(folder) -> dict:
    return read_manifest(load_file(folder / WEIGHTS)["base_model.model.task_memory.sapt_manifest"])


def rewrite(folder, change) -> None:
    """Change tensors of the weights file, and write it as a valid safetensors file again."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def rewrite_manifest(folder, **values) -> None:
    def change(tensors) -> None:
        key = "base_model.model.task_memory.sapt_manifest"
        content = {**read_manifest(tensors[key]), **values}
        tensors[key] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8).clone()

    rewrite(folder, change)


def load(folder):
    return PeftModel.from_pretrained(build_pool("llama", ["a", "b", "c"]).unload(), folder)


def test_the_weights_file_describes_itself(folder) -> None:
    manifest, tensors = manifest_of(folder), load_file(folder / WEIGHTS)
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["tasks"] == ["a", "b", "c"] and manifest["ranks"] == [2, 3, 4]
    assert manifest["scalings"] == [16.0, 32 / 3, 8.0] and manifest["replay_rows"] == [0, 0, 3]
    assert manifest["committed"] == [True, True, True]
    own = {k: t for k, t in tensors.items() if not k.endswith("sapt_manifest")}
    assert manifest["sha256"] == {k.removeprefix("base_model.model."): digest(t) for k, t in own.items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["tasks"] == ["a", "b", "c"] and config["peft_type"] == "SAPT"


def test_files_have_the_permissions_of_the_umask(folder) -> None:
    for name in (WEIGHTS, "adapter_config.json", "README.md"):
        mask = os.umask(0)
        os.umask(mask)
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~mask
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_an_intact_pool_loads(folder) -> None:
    assert load(folder).tasks == ["a", "b", "c"]


@pytest.mark.parametrize("part", ["sapt_A", "sapt_old_B", "sapt_key", "sapt_targets", "sapt_replay"])
def test_a_changed_tensor_is_refused(folder, part: str) -> None:
    def flip(tensors) -> None:
        key = next(k for k in tensors if f".{part}." in k)
        tensors[key].view(-1)[0] += 1e-3

    rewrite(folder, flip)
    with pytest.raises(PoolFormatError, match=rf"{part}.*intact copy"):
        load(folder)


def test_missing_and_foreign_tensors_are_refused(folder) -> None:
    rewrite(folder, lambda t: t.pop(next(k for k in t if ".sapt_old_A." in k)))
    with pytest.raises(PoolFormatError, match=r"lacks \['.*sapt_old_A"):
        load(folder)


def test_a_foreign_tensor_is_refused(folder) -> None:
    rewrite(folder, lambda t: t.update({"base_model.model.x.sapt_A.weight": torch.zeros(1)}))
    with pytest.raises(PoolFormatError, match="unknown"):
        load(folder)


def test_a_config_of_another_generation_is_refused(folder) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config.update(tasks=["a", "b", "z"], task_name="z")
    path.write_text(json.dumps(config))
    with pytest.raises(PoolFormatError, match=r"tasks \['a', 'b', 'c'\].*\['a', 'b', 'z'\]"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "install a newer one"),
        ({"format_version": "x"}, "damaged"),
        ({"sha256": 3}, "digests"),
    ],
)
def test_manifests_of_the_future_or_damaged(folder, values, message) -> None:
    rewrite_manifest(folder, **values)
    with pytest.raises(PoolFormatError, match=message):
        load(folder)


def test_weights_without_a_manifest_are_refused(folder) -> None:
    rewrite(folder, lambda t: t.pop("base_model.model.task_memory.sapt_manifest"))
    with pytest.raises(PoolFormatError, match="no manifest"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_manifest_parsing_of_junk(content: bytes) -> None:
    with pytest.raises(PoolFormatError):
        read_manifest(torch.tensor(list(content), dtype=torch.uint8))


def test_manifest_of_an_empty_tensor_round_trips() -> None:
    manifest = read_manifest(build_manifest({"tasks": ["a"]}, {}, {"x": torch.zeros(0, 3)}))
    assert manifest["sha256"] == {"x": digest(torch.zeros(0, 3))}


def test_the_pool_grows_linearly_on_disk(tmp_path) -> None:
    sizes = []
    model = build_pool("llama", ["t0"], r=4, task_ranks=[4])
    for i in range(1, 10):
        grow(model, f"t{i}")
        model.save_pretrained(tmp_path / str(i))
        sizes.append((tmp_path / str(i) / WEIGHTS).stat().st_size)
    steps = [b - a for a, b in itertools.pairwise(sizes)]
    assert max(steps) <= 1.1 * min(steps)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
