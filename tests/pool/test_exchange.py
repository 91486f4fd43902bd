"""Tasks and mixtures leave as plain LoRA, plain LoRA comes in as a task; plain PEFT is the judge."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.steps import ROWS, digests, logits, step
from helpers.tiny import FAMILIES, assert_real_pool, build_pool, commit, padded
from peft_sapt import SaptConfig
from peft_sapt.errors import LoraFolderError, TaskError, WeightsError

TASKS = ["a", "b", "c"]


def bare(model):
    """The base model without the pool."""
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_an_exported_task_is_the_pool_with_that_task_alone(family, name, rslora, tmp_path) -> None:
    pool = build_pool(family, TASKS, use_rslora=rslora, task_alphas=[8, 5.5, 4])
    pool.export_task(name, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = PeftModel.from_pretrained(bare(pool), tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    assert plain.peft_config["default"].target_modules == ({"q", "v"} if family == "t5" else {"q_proj", "v_proj"})
    expected = logits(pool, sapt_task=name)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    others = [logits(pool, sapt_task=other) for other in TASKS if other != name]
    assert all(float((other - expected).abs().max()) > 0.01 for other in others)


def test_an_exported_mixture_is_exact(family, tmp_path) -> None:
    pool = build_pool(family, TASKS)
    weights = pool.attention_weights(**padded(ROWS))
    assert_real_pool(weights)
    pool.export_mixture(weights[0], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2 + 3 + 4 and config["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(bare(pool), tmp_path)
    torch.testing.assert_close(logits(plain), logits(pool, sapt_weights=weights[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(plain)[0], logits(pool)[0], atol=1e-5, rtol=1e-5)
    pool.export_mixture({"c": 0.75, "a": 0.5}, tmp_path)
    plain = PeftModel.from_pretrained(bare(pool), tmp_path)
    assert plain.peft_config["default"].r == 2 + 4
    torch.testing.assert_close(logits(plain), logits(pool, sapt_weights=[0.5, 0.0, 0.75]), atol=1e-5, rtol=1e-5)


def test_only_some_layers_adapted_are_named_in_full(tmp_path) -> None:
    pool = build_pool("llama", TASKS, layers_to_transform=[1])
    pool.export_task("b", tmp_path)
    plain = PeftModel.from_pretrained(bare(pool), tmp_path)
    assert all(".1." in name for name in plain.peft_config["default"].target_modules)
    torch.testing.assert_close(logits(plain), logits(pool, sapt_task="b"), atol=1e-5, rtol=1e-5)


def test_bad_mixtures(family, tmp_path) -> None:
    pool = build_pool(family, TASKS)
    for weights in ([1.0, 0.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 0.0]):
        with pytest.raises(WeightsError, match=r"one finite number for each of the tasks \['a', 'b', 'c'\]"):
            pool.export_mixture(weights, tmp_path / "x")
    with pytest.raises(TaskError, match="no task 'z'"):
        pool.export_mixture({"z": 1.0}, tmp_path / "x")
    with pytest.raises(TaskError, match="no task 'z'"):
        pool.export_task("z", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraFolderError, match="is a file"):
        pool.export_task("a", tmp_path / "file")


def pool_on(model, tasks: list[str]):
    """A pool of random blocks on the base of another adapter model."""
    settings = {"tasks": tasks, "task_ranks": [2, 3][: len(tasks)], "init_weights": False}
    return get_peft_model(bare(model), SaptConfig(task_type=model.peft_config["default"].task_type, **settings))


def plain_lora(family: str, folder, seed: int = 5, **settings):
    """A LoRA of another rank and alpha that does something, saved by plain PEFT, and the model it was made on."""
    task_type, make = FAMILIES[family]
    torch.manual_seed(seed)
    config = LoraConfig(**{"task_type": task_type, "r": 5, "lora_alpha": 7, "init_lora_weights": False, **settings})
    model = get_peft_model(make(), config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_an_imported_task_answers_as_its_lora(family, rslora, tmp_path) -> None:
    lora = plain_lora(family, tmp_path, use_rslora=rslora)
    expected = logits(lora)
    pool = pool_on(lora, ["a", "b"])
    commit(pool)
    before = digests(pool, "a")
    pool.import_task("c", tmp_path)
    assert pool.tasks == TASKS and pool.peft_config["default"].task_ranks == [2, 3, 5]
    torch.testing.assert_close(logits(pool, sapt_task="c"), expected, atol=1e-5, rtol=1e-5)
    assert digests(pool, "a") == before
    imported = digests(pool, "c")
    step(pool)
    assert digests(pool, "c") != imported and digests(pool, "a") == before, "the imported block trains on"


def test_import_replaces_an_open_task_and_round_trips(family, tmp_path) -> None:
    pool = build_pool(family, TASKS)
    expected = logits(pool, sapt_task="b")
    pool.export_task("b", tmp_path)
    fresh = pool_on(pool, ["first"])
    fresh.import_task("first", tmp_path)
    assert fresh.tasks == ["first"] and fresh.peft_config["default"].task_ranks == [3]
    torch.testing.assert_close(logits(fresh), expected, atol=1e-5, rtol=1e-5)
    fresh.save_pretrained(tmp_path / "pool")
    again = PeftModel.from_pretrained(bare(fresh), tmp_path / "pool")
    assert torch.equal(logits(again), logits(fresh))
    commit(fresh)
    with pytest.raises(TaskError, match="committed, so its block cannot be replaced"):
        fresh.import_task("first", tmp_path)


def test_modules_the_lora_leaves_alone_stay_the_identity(tmp_path) -> None:
    lora = plain_lora("llama", tmp_path, target_modules=["q_proj"])
    pool = pool_on(lora, ["a"])
    commit(pool)
    pool.import_task("c", tmp_path)
    torch.testing.assert_close(logits(pool, sapt_task="c"), logits(lora), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, "o_proj.*target_modules"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_loras_a_block_cannot_express_are_refused(settings, message, tmp_path) -> None:
    plain_lora("llama", tmp_path, **settings)
    refused(tmp_path, message)


def refused(folder, message: str) -> None:
    pool = build_pool("llama", ["a", "b"])
    before = {k: v.clone() for k, v in pool.state_dict().items()}
    with pytest.raises(LoraFolderError, match=message):
        pool.import_task("c", folder)
    after = pool.state_dict()
    assert pool.tasks == ["a", "b"] and before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_damaged_folders_are_refused(tmp_path) -> None:
    plain_lora("llama", tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, text = load_file(weights), config.read_text()
    first = next(key for key in state if "lora_A" in key)

    def with_weights(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, weights)
        refused(tmp_path, message)
        save_file(state, weights)

    with_weights({k: v for k, v in state.items() if k != first}, "has no place for")
    with_weights({k: v for k, v in state.items() if k != first.replace("lora_A", "lora_B")}, "but no")
    with_weights({**state, "base_model.model.x.lora_magnitude_vector": torch.ones(2)}, "has no place for")
    with_weights({**state, first: torch.full_like(state[first], torch.nan)}, "NaN")
    with_weights({**state, first: state[first][:2]}, "ranks")
    with_weights({**state, first: torch.zeros(5, 48)}, "another base model")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    refused(tmp_path, "readable safetensors")
    weights.write_bytes(whole)
    for broken, message in [
        ("{", "not JSON"),
        ("[]", "not a LORA"),
        (text.replace("LORA", "IA3"), "not a LORA"),
        (text.replace('"lora_alpha": 7', '"lora_alpha": null'), "lora_alpha"),
    ]:
        config.write_text(broken)
        refused(tmp_path, message)
    config.write_text(text)
    weights.rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "never from a pickle")
    config.unlink()
    refused(tmp_path, "is missing")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_loras_that_changed_the_base_model_are_refused(start, tmp_path) -> None:
    plain_lora("llama", tmp_path, init_lora_weights=start)
    refused(tmp_path, "path_initial_model_for_weight_conversion")


def test_factors_that_are_no_finite_matrices_are_refused(tmp_path) -> None:
    plain_lora("llama", tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, text = load_file(weights), config.read_text()
    first = next(key for key in state if "lora_A" in key)
    second = first.replace("lora_A", "lora_B")
    for a, b, message in [
        (torch.zeros(5, 64, 2), state[second], "no matrices"),
        (torch.zeros(64), state[second], "no matrices"),
        (torch.zeros(()), state[second], "no matrices"),
        (torch.zeros(5, 64, dtype=torch.int32), state[second], "no matrices"),
        (torch.full((5, 64), 1e300, dtype=torch.float64), state[second], "infinity"),
        (torch.zeros(0, 64), torch.zeros(64, 0), "above 0"),
    ]:
        save_file({**state, first: a, second: b}, weights)
        refused(tmp_path, message)
    save_file(state, weights)
    for broken in (text.replace('"lora_alpha": 7', '"lora_alpha": ' + "1" + "0" * 400), "[" * 100_000):
        config.write_text(broken)
        refused(tmp_path, "lora_alpha|not JSON")


def test_an_export_never_overwrites_a_pool(tmp_path) -> None:
    pool = build_pool("llama", TASKS)
    pool.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for call in (lambda: pool.export_task("a", tmp_path), lambda: pool.export_mixture([1, 1, 1], tmp_path)):
        with pytest.raises(LoraFolderError, match="holds a SAPT pool"):
            call()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_export_takes_one_row_of_weights_and_the_heads_of_its_own_pool(tmp_path) -> None:
    pool = build_pool("llama", TASKS)
    weights = pool.attention_weights(**padded(ROWS))
    with pytest.raises(WeightsError, match="single row"):
        pool.export_mixture(weights, tmp_path)
    pool.export_mixture(weights[:1], tmp_path)
    pool.add_adapter("other", SaptConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    pool.export_task("a", tmp_path)
    expected = logits(pool, sapt_task="a")
    pool.delete_adapter("other")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare(pool), tmp_path)), expected, atol=1e-5, rtol=1e-5)
