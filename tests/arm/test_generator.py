"""ARM's generator: stopped on prompts it never learned from, kept in a folder, drawn from again without data."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from helpers.tiny import build_pool
from helpers.training import FAST, fresh_pool, trainer
from helpers.words import TASKS, rows_of, tokenizer
from peft_sapt import ArmCallback, GeneratorSettings, save_pool
from peft_sapt.arm import fitting
from peft_sapt.arm.generator import generator_adapter
from peft_sapt.arm.pseudo import digest_of
from peft_sapt.errors import LoraFolderError, ReflectionError, TaskError

START, END = [3], 2


def prompts_of_task(task: str = "a") -> list[list[int]]:
    return [row["input_ids"][:-1] for row in rows_of(task)]


def test_held_out_prompts_are_never_learned(monkeypatch) -> None:
    prompts = [*prompts_of_task(), *prompts_of_task()[:10]]  # some of them twice
    training, held_out = fitting.split(prompts, 0.2, seed=1)
    different = set(map(tuple, prompts))
    assert len(held_out) == round(0.2 * len(different))
    assert not set(map(tuple, training)) & set(map(tuple, held_out))
    assert set(map(tuple, training)) | set(map(tuple, held_out)) == different
    assert fitting.split(prompts, 0.2, seed=1) == (training, held_out) != fitting.split(prompts, 0.2, seed=2)
    assert fitting.split(prompts[:5], 0.2, seed=1) == (prompts[:5], []), "one prompt tells nothing"
    assert fitting.split(prompts, 0.0, seed=1) == (prompts, [])
    model, learned, whole = fresh_pool(), set(), fitting.loss_of

    def spying(model, prompts, start, eos):
        if torch.is_grad_enabled():
            learned.update(map(tuple, prompts))
        return whole(model, prompts, start, eos)

    monkeypatch.setattr(fitting, "loss_of", spying)
    settings = GeneratorSettings(epochs=2, validation_share=0.2)
    with generator_adapter(model, settings):
        fitting.fit(model, prompts, START, END, settings, seed=1)
    assert learned == set(map(tuple, training))


@pytest.mark.parametrize("patience", [1, 2])
def test_the_fit_ends_when_held_out_prompts_get_worse_and_keeps_the_best(patience: int) -> None:
    model, prompts = fresh_pool(target_modules="all-linear"), prompts_of_task()
    settings = GeneratorSettings(
        epochs=200, learning_rate=3e-2, lora_dropout=0.0, validation_share=0.3, patience=patience
    )
    _, held_out = fitting.split(prompts, 0.3, seed=0)
    with generator_adapter(model, settings):
        found = fitting.fit(model, prompts, START, END, settings, seed=0)
        now = fitting.mean_loss(model, held_out, START, END, settings)
    best = min(range(len(found.held_out)), key=found.held_out.__getitem__)
    assert now == pytest.approx(found.held_out[best], abs=1e-5) and now < found.held_out[-1]
    assert len(found.held_out) - 1 - best == patience, "it stopped, and not before"
    assert len(found.losses) < settings.steps(len(prompts)) and 0 < found.best_step < len(found.losses)
    assert len(found.losses) % len(found.held_out) == 0, "one validation for each pass"


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"validation_share": 1.0}, {"validation_share": -0.1}])
def test_settings_out_of_range_name_themselves(wrong) -> None:
    with pytest.raises(ReflectionError, match=f"GeneratorSettings.{next(iter(wrong))}"):
        GeneratorSettings(**wrong)


def test_without_validation_it_runs_to_its_end() -> None:
    model, settings = fresh_pool(), GeneratorSettings(epochs=2, validation_share=0.0)
    with generator_adapter(model, settings):
        found = fitting.fit(model, prompts_of_task(), START, END, settings, seed=0)
    assert not found.held_out and found.best_step == len(found.losses) == settings.steps(len(prompts_of_task()))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A committed pool of two tasks, saved, and the folder of its generators."""
    folder = tmp_path_factory.mktemp("kept")
    model = fresh_pool(target_modules="all-linear")
    arm = ArmCallback(tokenizer(), replay="generated", generator=FAST, generator_folder=folder / "generators")
    for task in TASKS[:2]:
        if task not in model.tasks:
            model.add_task(task)
        trainer(model, folder, task, [arm]).train()
    model.save_pretrained(folder / "pool")
    model.add_task("c")
    model.save_pretrained(folder / "open")
    return folder, arm


def test_a_pool_opened_to_answer_stays_frozen(kept) -> None:
    folder, _ = kept
    model = PeftModel.from_pretrained(fresh_pool().unload(), folder / "open")
    ArmCallback(tokenizer(), replay="generated", generator=FAST, generator_folder=folder / "generators").redraw(
        model, "a"
    )
    assert not any(p.requires_grad for p in model.parameters())
    assert model.active_adapter == "default" and model.peft_config["default"].inference_mode


def reopened(folder) -> PeftModel:
    return PeftModel.from_pretrained(fresh_pool().unload(), folder / "pool").eval()


def test_a_kept_generator_is_a_plain_lora(kept) -> None:
    folder, arm = kept
    plain = PeftModel.from_pretrained(fresh_pool().unload(), folder / "generators/a").eval()
    drawing = json.loads((folder / "generators/a/generator.json").read_text())
    every = prompts_of_task("a")
    loss = fitting.mean_loss(plain, every, drawing["start"], drawing["end"], FAST)
    with plain.disable_adapter():
        untaught = fitting.mean_loss(plain, every, drawing["start"], drawing["end"], FAST)
    assert loss < 0.95 * untaught
    assert drawing["known"] == sorted(digest_of(prompt) for prompt in {tuple(p) for p in every})
    assert set(drawing) == {"start", "end", "closing", "longest", "known", "block"}, "no prompt is kept"
    assert arm.reports["a"]["generator_step"] > 0 and arm.reports["a"]["generator_held_out"]


def test_redrawing_needs_no_data(kept) -> None:
    folder, _ = kept
    model = reopened(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trains = {k for k, p in model.named_parameters() if p.requires_grad}
    arm = ArmCallback(tokenizer(), replay="generated", generator=FAST, generator_folder=folder / "generators")
    arm.redraw(model, "a", count=25, seed=5)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == trains and not model.training
    rows = model.base_model.hooks.memory.replay("default")
    assert [len(r) for r in rows] == [25, 20] == model.peft_config["default"].replay_rows
    texts = arm.pseudo_samples["a"]
    again = [torch.tensor([tokenizer()(text, add_special_tokens=False).input_ids]) for text in texts]
    torch.testing.assert_close(rows[0], model.pooled_prompts([{"input_ids": ids} for ids in again]))
    training = {tuple(p) for p in prompts_of_task("a")}
    assert not training & {tuple(ids[0].tolist()) for ids in again} and len(set(texts)) == 25
    after = model.state_dict()
    changed = {k for k in after if k not in before or not torch.equal(after[k], before[k])}
    assert len(changed) == 1 and "sapt_replay" in changed.pop() and set(before) == set(after)
    assert torch.equal(rows[1], before[next(k for k in before if "sapt_replay" in k)][20:])
    model.add_task("c")
    trainer(model, folder, "c", [ArmCallback(tokenizer(), replay="rows")]).train()
    assert model.committed_tasks == ["a", "b", "c"]


def test_redrawing_refuses_and_changes_nothing(kept, tmp_path) -> None:
    folder, _ = kept
    model = reopened(folder)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    arm = ArmCallback(tokenizer(), replay="generated", generator=FAST, generator_folder=tmp_path)
    with pytest.raises(ReflectionError, match=r"needs ArmCallback\(generator_folder"):
        ArmCallback(tokenizer(), replay="generated").redraw(model, "a")
    with pytest.raises(TaskError, match="no task 'z'"):
        arm.redraw(model, "z")
    with pytest.raises(ReflectionError, match=r"generator\.json is missing"):
        arm.redraw(model, "a")
    (tmp_path / "a").mkdir()
    wrong = [json.dumps({**DRAWING, **other}) for other in ({"start": ["x"]}, {"end": -1}, {"longest": 0})]
    for text in ("{", "[]", '{"start": []}', *wrong):
        (tmp_path / "a/generator.json").write_text(text)
        with pytest.raises(ReflectionError, match="does not describe a generator"):
            arm.redraw(model, "a")
    (tmp_path / "a/generator.json").write_text(json.dumps(DRAWING))
    with pytest.raises(LoraFolderError, match="is missing"):
        arm.redraw(model, "a")
    few = ArmCallback(tokenizer(), generator_folder=folder / "generators", generator=GeneratorSettings(max_draws=0))
    with pytest.raises(ReflectionError, match=r"0 usable pseudo-samples.*Nothing was changed"):
        few.redraw(model, "a")
    assert not few.reports and not few.pseudo_samples
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.peft_config) == ["default"]
    model.add_task("c")
    with pytest.raises(TaskError, match="not committed"):
        arm.redraw(model, "c")
    with pytest.raises(ReflectionError, match="router='ridge' keeps no replay rows"):
        arm.redraw(build_pool("llama", ["a", "b"], router="ridge"), "a")


def test_a_failed_reflect_keeps_no_texts(tmp_path) -> None:
    model = fresh_pool()
    arm = ArmCallback(
        tokenizer(), replay="generated", min_pseudo_samples=3, generator=GeneratorSettings(epochs=1, max_draws=0)
    )
    with pytest.raises(ReflectionError, match=r"0 usable pseudo-samples.*not committed"):
        trainer(model, tmp_path / "run", "a", [arm], max_steps=1).train()
    assert model.committed_tasks == [] and not arm.pseudo_samples and "a" in arm.reports
    save_pool(model, tmp_path / "pool", arm)
    assert not (tmp_path / "pool/replay").exists()


DRAWING = {"start": [3], "end": 2, "closing": [], "longest": 9, "known": []}
