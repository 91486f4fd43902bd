"""SAPT and its ablations as methods of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from ..arm import ArmCallback, GeneratorSettings
from ..arm.checks import pool_of
from ..config import SaptConfig
from ..pool.save_pool import save_pool
from .answering import weights_of_prompts
from .bounds import PerTask
from .learner import Bench, train
from .method import NAN, Found, Method, learn_stream, task_type


@dataclass
class Recipe:
    """A variant of SAPT: fields of its config, arguments of its [`ArmCallback`] (None: no callback at all), and
    whether keys and query projection learn at the blocks' rate, as in the official code."""

    config: dict[str, Any] = field(default_factory=dict)
    arm: dict[str, Any] | None = field(default_factory=dict)
    one_rate: bool = False


PAPER = {"features": "max", "fallback": None}  # the paper's query, and blocks for every prompt
MEAN = {
    "router": "ridge",
    "features": "mean",
    "ridge": 0.1,
    "fallback": None,
}  # the closed form as it was measured first
RECIPES = {
    "sapt": Recipe(),
    "sapt-ridge": Recipe(config={"router": "ridge"}),
    "sapt-paper": Recipe(config=PAPER, arm={"replay": "generated"}),
    "sapt-ridge-mean": Recipe(config=MEAN),
    "sapt-prompt": Recipe(config={**MEAN, "block": "prompt"}),
    "sapt-prompt-learned": Recipe(config={**PAPER, "block": "prompt"}, arm={"replay": "generated"}),
    "sapt-real-rows": Recipe(config=PAPER, arm={"replay": "rows"}),
    "sapt-no-floor": Recipe(config=PAPER, arm={"replay": "generated", "floor_weight": 0.0}),
    "sapt-no-arm": Recipe(config=PAPER, arm=None),
    # the official loss: KL alone, nothing that gives a new task weight; its gradient; one learning rate for everything
    "sapt-official": Recipe(
        config={**PAPER, "old_block_gradient": False},
        arm={"replay": "generated", "floor_weight": 0.0, "align_steps": 0},
        one_rate=True,
    ),
}


def sapt_config(bench: Bench, **fields: Any) -> SaptConfig:
    own: dict[str, Any] = {"r": bench.budget.r, "lora_alpha": bench.budget.lora_alpha}
    if fields.get("block") == "prompt":
        own["num_virtual_tokens"] = bench.budget.virtual_tokens
    else:
        own["layers_to_transform"] = bench.upper_layers()
    return SaptConfig(task_type=task_type(bench), task_name=next(iter(bench.stream)), **own, **fields)


def arm_for(bench: Bench, **arguments: Any) -> ArmCallback:
    budget = bench.budget
    settings = GeneratorSettings(
        epochs=budget.generator_epochs,
        batch_size=budget.generator_batch,
        learning_rate=budget.generator_lr,
        draw_batch_size=budget.draw_batch,
    )
    own = {"align_steps": budget.align_steps, "generator": settings, "progress": True}
    return ArmCallback(bench.tokenizer, **{**own, **arguments})


def prompt_training(bench: Bench) -> dict[str, Any]:
    """How soft prompts train: their own rate and epochs, in batches that mark the prompt."""
    budget = bench.budget
    return {
        "lr": budget.prompt_lr,
        "epochs": budget.prompt_epochs,
        "attention_lr": budget.attention_lr,
        "marks_prompts": True,
    }


class SaptMethod(Method):
    """A pool that learns by ``recipe``. Beside the matrices it reports

    ``train_weights`` [T][T], the mean attention on each task's training prompts when it had been learned;
    ``routing_by_stage`` and ``own_weight_by_stage``, both [T][T] like the matrix; ``mean_weights`` [T][T] and
    ``prompt_weights`` [T][N][T] on the scored prompts at the end; ``routing``, percent of prompts whose own block
    leads; ``left_to_base``, percent that the base model answers; ``new_task_weights``; ``pseudo_samples``, counts by
    task.
    """

    title = "SAPT"
    model: PeftModel

    def __init__(self, bench: Bench, recipe: Recipe) -> None:
        super().__init__(bench)
        prompt = recipe.config.get("block") == "prompt"
        self.model = get_peft_model(bench.fresh(adapts_input=prompt), sapt_config(bench, **recipe.config))
        self.arm = None if recipe.arm is None else arm_for(bench, **recipe.arm)
        rate = bench.budget.lr if recipe.one_rate else bench.budget.attention_lr
        self.training = prompt_training(bench) if prompt else {"attention_lr": rate, "marks_prompts": True}
        self.new_task_weights: dict[str, list[float]] = {}
        self.train_weights: list[list[float]] = []
        self.by_stage: list[tuple[list[float], list[float]]] = []

    def learn(self, name: str) -> None:
        if name not in self.model.tasks:
            self.model.add_task(name)
        callbacks = [] if self.arm is None else [self.arm]
        trainer = train(self.bench, self.model, name, callbacks, **self.training)
        key = f"attention/{name}"
        self.new_task_weights[name] = [logs[key] for logs in trainer.state.log_history if key in logs]
        mean = weights_of_prompts(self.bench, self.model, name, "train").mean(dim=0).tolist()
        self.train_weights.append(mean + [0.0] * (len(self.bench.stream) - len(mean)))

    def after_stage(self, stage: int) -> None:
        self.by_stage.append(routing_after(self.bench, self.model, stage))

    def extra_results(self) -> Found:
        routing, own = ([pair[i] for pair in self.by_stage] for i in (0, 1))
        return {
            "routing_by_stage": routing,
            "own_weight_by_stage": own,
            "train_weights": self.train_weights,
            **attention_of(self.bench, self.model),
            "new_task_weights": self.new_task_weights,
            "pseudo_samples": {} if self.arm is None else pseudo_reports(self.bench, self.model, self.arm),
        }

    def note_scores(self, scores: dict[str, float]) -> None:
        """For the model card."""
        metric = self.bench.score.__name__.replace("_", " ")
        for name, score in scores.items():
            self.model.record_task(name, score=round(score, 1), metric=f"{metric}, %")

    def save(self, folder: Any) -> None:
        """The pool, and its pseudo-samples as text."""
        save_pool(self.model, folder, self.arm)


class PromptPerTask(PerTask):
    """A soft prompt for each task, which is named at test time.

    One prompt is a pool of one, which is PEFT's prompt tuning to the bit (tests/routing/test_soft_prompt.py), with the
    virtual tokens next to the row's however it is padded.
    """

    title = "one prompt per task"

    def base(self) -> Any:
        return self.bench.fresh(adapts_input=True)

    def config(self) -> PeftConfig:
        return sapt_config(self.bench, block="prompt")

    def training(self) -> dict[str, Any]:
        return prompt_training(self.bench)


class PromptSequential(Method):
    """One soft prompt, trained on task after task."""

    title = "sequential prompt tuning"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.model = get_peft_model(bench.fresh(adapts_input=True), sapt_config(bench, block="prompt"))

    def learn(self, name: str) -> None:
        train(self.bench, self.model, name, [], **prompt_training(self.bench))


def learn_pool(bench: Bench, recipe: Recipe) -> tuple[PeftModel, ArmCallback | None, Found]:
    """A pool that has learned the bench's stream, its callback, and what [`SaptMethod`] reports."""
    method = SaptMethod(bench, recipe)
    found = learn_stream(method)
    return method.model, method.arm, found


def routing_after(bench: Bench, model: PeftModel, stage: int) -> tuple[list[float], list[float]]:
    """Percent of scored prompts whose own block leads, and their own block's mean weight, for the tasks so far."""
    names = list(bench.stream)
    attention = [weights_of_prompts(bench, model, name) for name in names[: stage + 1]]
    later = [NAN] * (len(names) - stage - 1)
    led = [percent_led(w, i) for i, w in enumerate(attention)]
    return led + later, [float(w[:, i].mean()) for i, w in enumerate(attention)] + later


def percent_led(weights: Tensor, task: int) -> float:
    """Percent of prompts whose largest weight [N, T] is that of ``task``; those left to the base model have none."""
    return 100.0 * float(((weights.argmax(dim=1) == task) & weights.any(dim=1)).float().mean())


def percent_left(weights: Tensor) -> float:
    """Percent of prompts, with weights [N, T], that are left to the base model."""
    return 100.0 * float((~weights.any(dim=1)).float().mean())


def pseudo_reports(bench: Bench, model: PeftModel, arm: ArmCallback) -> Found:
    """The callback's counts, and counted again at the end: kept texts that are a training prompt verbatim, and percent
    of kept pseudo-samples whose own block leads."""
    pool = pool_of(model)
    reports: Found = {}
    for i, (name, rows) in enumerate(zip(pool.tasks, pool.memory.replay(pool.adapter), strict=True)):
        reports[name] = dict(arm.reports.get(name, {}))
        if name in arm.pseudo_samples:
            known = set(bench.tokenizer.batch_decode(bench.prompts(bench.stream[name]["train"])))
            reports[name]["kept_copies"] = sum(text in known for text in arm.pseudo_samples[name])
        if len(rows):
            reports[name]["routed_to_own"] = percent_led(pool.router.attend(pool.adapter, rows), i)
    return reports


def attention_of(bench: Bench, model: PeftModel) -> Found:
    names = list(bench.stream)
    attention = {name: weights_of_prompts(bench, model, name) for name in names}
    return {
        "mean_weights": [attention[name].mean(dim=0).tolist() for name in names],
        "prompt_weights": {n: [[float(f"{v:.4g}") for v in row] for row in attention[n].tolist()] for n in names},
        "routing": [percent_led(attention[n], i) for i, n in enumerate(names)],
        "left_to_base": [percent_left(attention[n]) for n in names],
    }
