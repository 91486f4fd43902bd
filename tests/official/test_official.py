"""Pools of the official release: the golden ones, written in its format, answer as the release does; bad ones do not
load."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.golden import FILES, FOLDER, base_model, needs_golden, read
from peft_sapt.errors import OfficialCheckpointError
from peft_sapt.official import load_official_checkpoint
from peft_sapt.official.folders import read_attention

MANY = [stem for stem in FILES if not stem.endswith("_T1")]


def write_release(stem: str, outputs: Path) -> dict[str, torch.Tensor]:
    """The pool of a fixture as the release saves it, one folder for each task, older blocks repeated."""
    kind, count = stem.rsplit("_T", 1)
    base, pool, total = read(FOLDER / f"{kind}_base.safetensors"), read(FOLDER / f"{stem}.safetensors"), int(count)
    query = {k.removeprefix("router.trans_input."): t for k, t in base.items() if k.startswith("router.trans_input.")}
    for number in range(1, total + 1):  # the fixture has the newest first
        newest = total - number
        folder = outputs / f"{number}-task_{number}" / "saved_weights"
        folder.mkdir(parents=True)
        torch.save(query, folder / "trans_input.pt")
        torch.save(pool["router.keys"][newest:].clone(), folder / "prompts_keys_till_now.pt")
        weights = pool["capture.label_official"].float().numpy() if number == total else np.full(number, 1 / number)
        (folder / "attention_weights.pkl").write_bytes(pickle.dumps(weights))
        for side in "AB":
            state = {}
            for key, stack in pool.items():
                if not key.startswith("lora.") or not key.endswith(f".{side}"):
                    continue
                parent, name = key.removeprefix("lora.").removesuffix(f".{side}").rsplit(".", 1)
                for i, tensor in enumerate(stack[newest:]):
                    own = f"lora_{name[0]}" if i == 0 else f"previous_lora_weights_{name[0]}.{i - 1}"
                    state[f"{parent}.{own}.lora_{side}"] = tensor.clone()
            torch.save(state, folder / f"lora_weights_{side}.pt")
    return pool


def load(stem: str, outputs: Path):
    kind = stem.rsplit("_T", 1)[0]
    return load_official_checkpoint(base_model(kind, read(FOLDER / f"{kind}_base.safetensors")), outputs)


@needs_golden
@pytest.mark.parametrize("stem", FILES)
def test_a_released_pool_answers_as_the_release_does(stem: str, tmp_path) -> None:
    pool = write_release(stem, tmp_path)
    model = load(stem, tmp_path).eval()
    inputs = {name: pool[f"nopad.in.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    found = model(**inputs)
    torch.testing.assert_close(found.logits, pool["nopad.out.logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, pool["nopad.out.loss"], rtol=1e-5, atol=1e-5)
    count = int(stem.rsplit("_T", 1)[1])
    assert model.tasks == [f"task_{i}" for i in range(1, count + 1)] and model.committed_tasks == model.tasks
    targets = model.base_model.hooks.memory.targets("default")
    torch.testing.assert_close(targets[-1], pool["capture.label_official"].float().flip(0))
    model.add_task("next")
    model.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "adapter_model.safetensors").exists()


@needs_golden
def test_without_its_attention_the_newest_task_stays_open(tmp_path) -> None:
    write_release(MANY[0], tmp_path)
    for path in tmp_path.rglob("attention_weights.pkl"):
        path.unlink()
    model = load(MANY[0], tmp_path)
    assert model.committed_tasks == model.tasks[:-1]
    assert any(p.requires_grad for p in model.parameters())


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('run').touch()",))


def test_a_pickle_makes_arrays_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "attention_weights.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for dtype in (np.float32, np.float64):
            path.write_bytes(pickle.dumps(np.array([0.25, 0.75], dtype=dtype), protocol=protocol))
            assert read_attention(path).tolist() == [0.25, 0.75]
    for bad, message in (
        (pickle.dumps(Evil()), r"asks for builtins.eval, where only a numpy array may be"),
        (pickle.dumps(np.array([Evil()], dtype=object)), r"numbers of type 'O8'|the step"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "not a pickled numpy array|memo out of bounds"),
        (pickle.dumps(np.array([0.5]), protocol=2)[:-1] + b"0.", "the step POP"),
        (b"cos\nsystem\n(S'touch run'\ntR.", r"asks for (os|posix).system"),
        (pickle.dumps(np.eye(2)), r"shape \(2, 2\)"),
        (pickle.dumps(np.array([np.nan])), "finite vector"),
        (b"\x80\x04", "not a pickled numpy array"),
        (b"", "not a pickled numpy array"),
        (bytes(2**20 + 1), "is not read"),
    ):
        path.write_bytes(bad)
        with pytest.raises(OfficialCheckpointError, match=message):
            read_attention(path)
    assert not (tmp_path / "run").exists()


def damage_keys(outputs: Path) -> None:
    torch.save(torch.zeros(1, 3), outputs / "3-task_3" / "saved_weights" / "prompts_keys_till_now.pt")


def damage_query(outputs: Path) -> None:
    torch.save({"0.weight": torch.zeros(1)}, outputs / "3-task_3" / "saved_weights" / "trans_input.pt")


def remove_number(outputs: Path) -> None:
    shutil.rmtree(outputs / "2-task_2")


def remove_file(outputs: Path) -> None:
    (outputs / "2-task_2" / "saved_weights" / "lora_weights_B.pt").unlink()


def mix_runs(outputs: Path) -> None:
    path = outputs / "1-task_1" / "saved_weights" / "lora_weights_A.pt"
    torch.save({k: t + 1 for k, t in torch.load(path).items()}, path)


def hide_code(outputs: Path) -> None:
    path = outputs / "3-task_3" / "saved_weights" / "lora_weights_A.pt"
    path.write_bytes(pickle.dumps(Evil()))


def wrong_attention(outputs: Path) -> None:
    path = outputs / "2-task_2" / "saved_weights" / "attention_weights.pkl"
    path.write_bytes(pickle.dumps(np.array([0.2, 0.3, 0.5])))


def other_layers(outputs: Path) -> None:
    for side in "AB":
        path = outputs / "3-task_3" / "saved_weights" / f"lora_weights_{side}.pt"
        torch.save({k.replace("layers.1", "layers.9"): t for k, t in torch.load(path).items()}, path)


DAMAGES = {
    damage_keys: r"prompts_keys_till_now.pt holds \[1, 3\], not one key of 64 for each of the 3 tasks",
    damage_query: r"trans_input.pt is no query projection for embeddings of 64",
    remove_number: r"should hold 1-<task>/saved_weights, 2-<task>.*it has \[1, 3\]",
    remove_file: r"lora_weights_B.pt is missing",
    mix_runs: r"repeats the block of 'task_1' otherwise than",
    hide_code: r"lora_weights_A.pt cannot be read as tensors",
    wrong_attention: r"is no attention over 2 tasks",
    other_layers: r"adapts other layers than|The base model has no projection for model.layers.9",
}


@needs_golden
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_what_does_not_fit_is_refused_by_name(damage, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_release("llama_tiny_T3", tmp_path / "outputs")
    damage(tmp_path / "outputs")
    base = base_model("llama_tiny", read(FOLDER / "llama_tiny_base.safetensors"))
    before = [name for name, _ in base.named_parameters()]
    with pytest.raises(OfficialCheckpointError, match=DAMAGES[damage]):
        load_official_checkpoint(base, tmp_path / "outputs")
    assert [name for name, _ in base.named_parameters()] == before and not (tmp_path / "run").exists()
