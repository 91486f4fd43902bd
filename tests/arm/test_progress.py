"""What takes long says so, in a log without a terminal too, and is quiet where the Trainer is; and a task that is not
learned is told in time."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from helpers.training import fresh_pool, trainer
from helpers.words import prompts_of, tokenizer
from peft_sapt import ArmCallback, GeneratorSettings
from peft_sapt.arm import progress
from peft_sapt.arm.signs import LearningWarning, warn_of_closed_gate, warn_of_flat_loss, warn_of_short_reach

FEW = GeneratorSettings(epochs=2, learning_rate=1e-2, max_draws=200)


@pytest.fixture
def lines(monkeypatch, capsys):
    """Every item counts as slow; gives the lines written since."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_has_seconds_and_counts(lines) -> None:
    assert list(progress.counted("abc", "reading", 3)) == ["a", "b", "c"]
    said = lines()
    assert len(said) == 3 and re.fullmatch(r"\[ +\d+ s\] reading: 3 of 3 done in 0 s", said[-1])
    assert list(progress.counted(iter("ab"), "drawing")) == ["a", "b"]
    assert re.search(r"drawing: 2 done in", lines()[-1])


def test_nothing_is_said_of_what_is_quick_or_quiet(capsys) -> None:
    progress.say("now")
    assert list(progress.counted(range(1000), "reading")) == list(range(1000))
    with progress.quiet(), progress.quiet(False):
        progress.say("never")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "disable_tqdm", "speaks"),
    [(None, True, False), (None, False, True), (True, True, True), (False, False, False)],
)
def test_the_callback_speaks_as_the_trainer_does(tmp_path, lines, given, disable_tqdm, speaks) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer(), progress=given)
    trainer(model, tmp_path, "a", [arm], disable_tqdm=disable_tqdm).train()
    said = [line for line in lines() if re.match(r"\[ +\d+ s\]", line)]
    assert bool(said) == speaks, said


def test_every_long_phase_of_a_task_speaks(tmp_path, lines) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay="generated", generator=FEW, progress=True)
    trainer(model, tmp_path, "a", [arm]).train()
    model.add_task("b")
    trainer(model, tmp_path, "b", [arm]).train()
    text = "\n".join(lines())
    for phase in (
        "reading its prompts",
        "everyday prompts",
        "fitting the attention",
        "fitting the generator",
        "drawing",
    ):
        assert phase in text, phase


def test_an_own_loop_is_told_too(lines) -> None:
    model = fresh_pool()
    ArmCallback(tokenizer()).prepare(model, [prompts_of("a", seed=0)])
    assert "reading its prompts" in "\n".join(lines())
    ArmCallback(tokenizer(), progress=False).prepare(fresh_pool(), [prompts_of("a", seed=0)])
    assert lines() == []


# --- signs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_a_rate_at_which_nothing_moves_is_told_before_training(tmp_path, router: str) -> None:
    arm = ArmCallback(tokenizer())
    with pytest.warns(LearningWarning, match=r"'a' is about to be trained in 12 steps at a learning rate of 5e-05"):
        trainer(fresh_pool(router=router), tmp_path, "a", [arm], learning_rate=5e-5).train()


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_a_stream_that_is_learned_warns_of_nothing(tmp_path, router: str) -> None:
    model, arm = fresh_pool(router=router), ArmCallback(tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearningWarning)
        for name in ("a", "b", "c"):
            if name not in model.tasks:
                model.add_task(name)
            trainer(model, tmp_path, name, [arm], max_steps=40, learning_rate=1e-2).train()


def test_other_optimizers_and_blocks_are_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearningWarning)
        for fields in ({}, {"block": "prompt", "num_virtual_tokens": 2}):
            model = fresh_pool(**fields)
            own = [p for p in model.parameters() if p.requires_grad]
            kind = torch.optim.AdamW if fields else torch.optim.SGD
            warn_of_short_reach(model.base_model.pool, kind(own, lr=1e-9), 10)
        warn_of_short_reach(model.base_model.pool, None, 10)


def test_a_gate_that_stays_closed_is_told(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer())
    trainer(model, tmp_path, "a", [arm]).train()
    model.add_task("b")
    closed = ArmCallback(tokenizer(), align_steps=0, floor_weight=0.0)
    with pytest.warns(LearningWarning) as told:
        trainer(model, tmp_path, "b", [closed], max_steps=2).train()
    texts = [str(warning.message) for warning in told if warning.category is LearningWarning]
    assert any("before its first step" in text for text in texts) and any("ends with a weight of" in t for t in texts)
    assert all("align_steps=400" in text for text in texts if "weight of" in text)
    pool = model.base_model.pool
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearningWarning)
        warn_of_closed_gate(pool, 0.5, 400, ended=True)
    with pytest.warns(LearningWarning, match="router='ridge' in a new pool"):
        warn_of_closed_gate(pool, 0.4, 400, ended=True)


def history(*losses: float, every: int = 4) -> list[dict[str, float]]:
    return [{"loss": loss, "step": every * (i + 1)} for i, loss in enumerate(losses)]


def test_a_loss_that_does_not_fall_is_told() -> None:
    with pytest.warns(LearningWarning, match=r"'a' did not fall: it was 3\.1 .* is 3\.05 at the end"):
        warn_of_flat_loss("a", history(3.1, 3.2, 3.05), 12)


@pytest.mark.parametrize(
    "logged",
    [
        [],
        history(3.0),
        history(3.0, 2.0),
        history(0.0011, 0.0012),  # at its floor
        history(1.21, 1.20, every=500),  # a mean over steps after the fall
        [{"eval_loss": 3.0}, {"loss": 3.0, "step": 1}],
    ],
)
def test_other_losses_are_not(logged) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearningWarning)
        warn_of_flat_loss("a", logged, 1000)


def test_a_warning_made_an_error_loses_no_training(tmp_path) -> None:
    """It comes when the task is committed."""
    model, arm = fresh_pool(), ArmCallback(tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearningWarning)
        with pytest.raises(LearningWarning, match="did not fall"):
            trainer(model, tmp_path, "a", [arm], learning_rate=1e-3, max_grad_norm=1e-12, max_steps=20).train()
    assert model.committed_tasks == ["a"]


def test_schedules_that_begin_low_are_read_by_their_highest_rate() -> None:
    model = fresh_pool()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearningWarning)
        warn_of_short_reach(model.base_model.pool, optimizer, 12)


def test_the_advice_is_never_what_is_set_already() -> None:
    model = fresh_pool()
    own = [p for p in model.parameters() if p.requires_grad]
    pool = model.base_model.pool
    pool.config.task_alphas = [0.1]  # so small that no usual rate is enough
    with pytest.warns(LearningWarning, match="Try more steps, or a larger lora_alpha"):
        warn_of_short_reach(pool, torch.optim.AdamW(own, lr=6e-3), 1)
