"""Crafted pools: each damage has an error class of its own, nothing runs, nothing leaves the folder."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file

from helpers.committed import committed_pool
from helpers.tiny import build_pool, grow, padded, tiny_llama, token_rows
from peft_sapt import SaptConfig, accept, save_pool
from peft_sapt.errors import (
    ChangedTensorError,
    ConfigFileError,
    FormatVersionError,
    HeaderError,
    MissingTensorError,
    NonFiniteError,
    OtherBaseError,
    OtherShapeError,
    PickleError,
    PoolFormatError,
    SaptError,
    TrainingError,
    TruncatedFileError,
    UnknownTensorError,
    UnsafeNameError,
)
from peft_sapt.hub.push import push_folder
from peft_sapt.storage.manifest import digest, read_manifest, write_manifest
from peft_sapt.storage.plain_file import plain_name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.task_memory.sapt_manifest"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_pool(committed_pool(), tmp_path / "pool")
    return tmp_path / "pool"


def base():
    return committed_pool().unload()


def load(folder: Path, onto=None) -> PeftModel:
    return PeftModel.from_pretrained(base() if onto is None else onto, folder)


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def first(tensors: dict, part: str = ".sapt_A.") -> str:
    return next(name for name in tensors if part in name)


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) - 100])


def flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 40] ^= 0x10
    (folder / WEIGHTS).write_bytes(data)


def not_a_number(folder: Path) -> None:
    """Saved in that state, so that the digest is right."""

    def change(tensors: dict) -> None:
        name = first(tensors)
        tensors[name][0, 0] = torch.nan
        manifest = read_manifest(tensors[KEY])
        manifest["sha256"][plain_name(name)] = digest(tensors[name])
        tensors[KEY] = write_manifest(manifest)

    rewritten(folder, change)


def missing(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.pop(first(tensors, ".sapt_old_B.")))


def extra(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({"base_model.model.model.sapt_A.weight": torch.zeros(2)}))


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(folder / "ran")))


def traversal(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    names = ["../../outside", "b", "c"]
    (folder / CONFIG).write_text(json.dumps({**values, "tasks": names, "task_name": "c"}))


def future(folder: Path) -> None:
    rewritten(folder, lambda t: t.update({KEY: write_manifest({**read_manifest(t[KEY]), "format_version": 99})}))


def gigabyte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[:8] = (2**30).to_bytes(8, "little")
    (folder / WEIGHTS).write_bytes(data)


TABLE = [
    (truncated, TruncatedFileError, "is longer or shorter than its header says"),
    (flipped, ChangedTensorError, "differ from their digest"),
    (not_a_number, NonFiniteError, "NaN or infinity"),
    (missing, MissingTensorError, "lacks .*sapt_old_B"),
    (extra, UnknownTensorError, "unknown tensors .*sapt_A"),
    (pickled, PickleError, "a pickle, which can run code"),
    (traversal, UnsafeNameError, "has a slash, a dot"),
    (future, FormatVersionError, "format version 99"),
    (gigabyte, HeaderError, "claims a header larger than any pool's"),
]


@pytest.mark.parametrize(("damage", "error", "said"), TABLE, ids=[row[0].__name__ for row in TABLE])
def test_each_damage_has_its_error(folder: Path, damage, error, said: str) -> None:
    damage(folder)
    with pytest.raises(error, match=said) as caught:
        load(folder)
    assert type(caught.value) is error and not (folder / "ran").exists()


def test_other_bases_have_their_errors(folder: Path) -> None:
    with pytest.raises(OtherBaseError, match="other values") as caught:
        load(folder, tiny_llama())
    assert type(caught.value) is OtherBaseError
    with pytest.raises(OtherShapeError, match="have width 32") as caught:
        load(folder, tiny_llama(hidden=32))
    assert type(caught.value) is OtherShapeError


def test_every_class_of_the_table_is_another_one() -> None:
    classes = [row[1] for row in TABLE] + [OtherBaseError, OtherShapeError]
    assert len(set(classes)) == len(classes) == 11 and all(issubclass(c, SaptError) for c in classes)


@pytest.mark.parametrize(
    ("damage", "name"),
    [(flipped, "changed_tensors"), (not_a_number, "nonfinite"), (missing, "missing_tensors"),
     (extra, "unknown_tensors"), (future, "newer_format")],
)  # fmt: skip
def test_each_can_be_accepted_by_its_name_and_by_no_other(folder: Path, damage, name: str) -> None:
    damage(folder)
    others = {"changed_tensors", "nonfinite", "missing_tensors", "unknown_tensors", "newer_format"} - {name}
    with accept(*others), pytest.raises(PoolFormatError):
        load(folder)
    with accept(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load(folder).tasks == ["a", "b", "c"]


def head_pool() -> PeftModel:
    return build_pool("llama", ["a"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("damage", ["changed", "nan"])
def test_a_head_is_checked_like_a_block(tmp_path, damage: str) -> None:
    head_pool().save_pretrained(tmp_path)

    def change(tensors: dict) -> None:
        tensors["base_model.model.lm_head.weight"][0, 0] = 7.0 if damage == "changed" else torch.nan

    rewritten(tmp_path, change)
    with pytest.raises(ChangedTensorError, match="lm_head"):
        PeftModel.from_pretrained(head_pool().unload(), tmp_path)
    with (
        accept("changed_tensors"),
        pytest.raises(NonFiniteError, match="lm_head") if damage == "nan" else warnings.catch_warnings(),
    ):
        PeftModel.from_pretrained(head_pool().unload(), tmp_path)


def test_a_head_that_is_not_finite_is_not_committed() -> None:
    model = head_pool()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight[0] = torch.nan
    with pytest.raises(TrainingError, match="lm_head"):
        model.commit_task(inputs=[padded(token_rows([4]))])


def test_a_number_without_end_in_a_manifest(folder: Path) -> None:
    text = json.dumps({"format_version": 2, "x": 1}).replace("1}", "9" * 5000 + "}")
    rewritten(folder, lambda t: t.update({KEY: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()}))
    with pytest.raises(PoolFormatError, match="not JSON"):
        load(folder)


# --- code ------------------------------------------------------------------------------------------------------------


def test_a_config_cannot_have_a_module_imported(folder: Path, monkeypatch) -> None:
    (folder.parent / "evil_module.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(folder.parent))
    values = json.loads((folder / CONFIG).read_text())
    mapping = {"base_model_class": "Evil", "parent_library": "evil_module"}
    (folder / CONFIG).write_text(json.dumps({**values, "task_type": None, "auto_mapping": mapping}))
    with pytest.raises(ConfigFileError, match="evil_module"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigFileError, match="evil_module"):
        load(folder)
    assert not (folder.parent / "ran").exists() and "evil_module" not in sys.modules


# --- names and paths -------------------------------------------------------------------------------------------------

NAMES = ["../x", "..", "a/b", "a\\b", "/etc/passwd", "C:x\\y", "a.b", "", " ", "1", "a\nb", "a\x00b", "a\u202eb",
         "\u200b", "x" * 129, "~/x/y", "a\x1b[31m"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_could_lead_out(tmp_path, name: str) -> None:
    model = build_pool("llama", ["a", "b", "c"])
    for act in (model.add_task, lambda n: SaptConfig(tasks=["a", n]), lambda n: SaptConfig(task_name=n)):
        with pytest.raises(SaptError):
            act(name)
    assert model.tasks == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a'b", 'say "x"', "$(touch x)", "a;b", "<b>", "%s{0}", "naïve", "任务", "a b"])
def test_odd_names_travel_as_they_are(tmp_path, name: str) -> None:
    model = build_pool("llama", ["a", "b", "c"])
    grow(model, name)
    save_pool(model, tmp_path / "pool")
    assert (
        PeftModel.from_pretrained(build_pool("llama", ["a", "b", "c"]).unload(), tmp_path / "pool").tasks[-1] == name
    )
    assert [p.name for p in tmp_path.iterdir()] == ["pool"]


def test_writing_over_a_link_leaves_what_it_points_to(tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    target = tmp_path / "pool"
    target.mkdir()
    for name in (WEIGHTS, CONFIG, "README.md", "attention.png"):
        (target / name).symlink_to(secret)
    (target / "README.md").unlink()
    save_pool(committed_pool(), target)
    assert secret.read_text() == "mine" and not (target / WEIGHTS).is_symlink()


def test_what_an_old_manifest_names_is_not_taken_away_elsewhere(folder: Path) -> None:
    """Saving over a pool of a stranger's removes the texts of its tasks, by names that its file has."""
    secret = folder.parent / "secret.jsonl"
    secret.write_text("mine")
    (folder / "replay").mkdir()
    for names in (["../../secret", "a"], [["x"]], "abc", [3]):
        rewritten(folder, lambda t, n=names: t.update({KEY: write_manifest({**read_manifest(t[KEY]), "tasks": n})}))
        save_pool(committed_pool(), folder)
        assert secret.read_text() == "mine"


def test_links_do_not_become_part_of_a_pool(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("mine")
    (folder / "replay").mkdir()
    (folder / "replay" / "a.jsonl").symlink_to(secret)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    save_pool(committed_pool(), folder)
    assert not (folder / "README.md").is_symlink() and "mine" not in (folder / "README.md").read_text()
    assert (folder / "replay" / "a.jsonl").is_symlink(), "it is left as it was, and never read"


def test_a_link_is_not_pushed(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("mine")
    (folder / "replay").mkdir()
    (folder / "replay" / "a.jsonl").symlink_to(secret)
    with pytest.raises(PoolFormatError, match="outside of the pool's folder"):
        push_folder(folder, "me/x", endpoint="http://127.0.0.1:9", token="x")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim",
    [{"task_ranks": [10**12, 3, 3]}, {"replay_rows": [10**12, 4, 4]}, {"query_dim": 10**12}, {"token_dim": 10**12},
     {"num_virtual_tokens": 10**12}],
    ids=lambda claim: next(iter(claim)),
)  # fmt: skip
def test_claims_beyond_the_file_are_refused_before_anything_is_built(folder: Path, claim: dict) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **claim}))
    with pytest.raises(ConfigFileError, match="can hold"):
        load(folder)


def test_json_without_end(folder: Path) -> None:
    (folder / CONFIG).write_text('{"a":' * 100_000)
    with pytest.raises(ConfigFileError, match="not JSON"):
        SaptConfig.from_pretrained(str(folder))


def test_a_header_that_lies_about_offsets(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(HeaderError, match="describes tensors that it cannot hold"):
        load(folder)
    assert padded(token_rows([2]))


def test_no_json_of_any_size_is_read(tmp_path) -> None:
    """A file of 65 MiB, sparse: its size is looked at before its content."""
    from peft_sapt.arm.stored import read_drawing
    from peft_sapt.continual.results import load_runs
    from peft_sapt.storage.lora_folder import read_lora
    from peft_sapt.storage.prompt_folder import read_prompt

    for name in (CONFIG, "generator.json", "sapt.listed.0.json"):
        with open(tmp_path / name, "wb") as stream:
            stream.truncate(65 * 2**20)
    for read in (read_lora, lambda f: read_prompt(f, 1, 1), read_drawing, load_runs):
        with pytest.raises(SaptError, match="more than the 67108864 that are read"):
            read(tmp_path)
