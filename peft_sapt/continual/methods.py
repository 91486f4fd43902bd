"""Methods of continual learning, each under one budget: what they score after every stage of a stream.

Every method is a function of a [`Bench`] that returns a plain dict: ``matrix`` R [T][T], row i after stage i, NaN
above the diagonal, in percent; ``validation``, the scores on the validation rows at the end; and what only it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import set_seed

from ..config import SaptConfig
from ..reflection import ArmCallback, GeneratorSettings
from ..reflection.checks import pool_of
from .learner import Bench, evaluate, stage_row, train, weights_of_prompts

Found = dict[str, Any]


def task_type(bench: Bench) -> str:
    return "SEQ_2_SEQ_LM" if bench.encoder_decoder else "CAUSAL_LM"


def lora_config(bench: Bench) -> LoraConfig:
    return LoraConfig(
        task_type=task_type(bench),
        r=bench.budget.r,
        lora_alpha=bench.budget.lora_alpha,  # type: ignore[arg-type]
        layers_to_transform=bench.upper_layers(),
    )


def learn_sequential(bench: Bench) -> Found:
    """One LoRA, trained on task after task."""
    set_seed(bench.budget.seed)
    model = get_peft_model(bench.fresh(), lora_config(bench))
    matrix = []
    for stage, name in enumerate(tqdm(bench.stream, desc="sequential LoRA")):
        train(bench, model, name, [])
        matrix.append(stage_row(bench, model, stage))
    return {"matrix": matrix, "validation": evaluate(bench, model, list(bench.stream), "validation")}


def learn_per_task(bench: Bench) -> Found:
    """A fresh LoRA for each task, which is named at test time: the upper bound, and FWT's single-task scores."""
    single, validation = [], []
    for name in tqdm(bench.stream, desc="one LoRA per task"):
        set_seed(bench.budget.seed)
        model = get_peft_model(bench.fresh(), lora_config(bench))
        train(bench, model, name, [])
        single += evaluate(bench, model, [name])
        validation += evaluate(bench, model, [name], "validation")
    return {"single": single, "matrix": never_forgotten(single), "validation": validation}


def prompt_tuning(bench: Bench) -> tuple[PeftModel, dict[str, Any]]:
    """A model with one soft prompt, and how it trains.

    It is a pool of one, which is PEFT's prompt tuning to the bit (tests/test_soft_prompt.py), with the virtual tokens
    next to the row's however it is padded.
    """
    set_seed(bench.budget.seed)
    model = get_peft_model(bench.fresh(adapts_input=True), sapt_config(bench, block="prompt"))
    return model, prompt_training(bench)


def prompt_training(bench: Bench) -> dict[str, Any]:
    budget = bench.budget
    return {
        "lr": budget.prompt_lr,
        "epochs": budget.prompt_epochs,
        "attention_lr": budget.attention_lr,
        "marks_prompts": True,
    }


def learn_prompt_sequential(bench: Bench) -> Found:
    """One soft prompt, trained on task after task."""
    model, training = prompt_tuning(bench)
    matrix = []
    for stage, name in enumerate(tqdm(bench.stream, desc="sequential prompt tuning")):
        train(bench, model, name, [], **training)
        matrix.append(stage_row(bench, model, stage))
    return {"matrix": matrix, "validation": evaluate(bench, model, list(bench.stream), "validation")}


def learn_prompt_per_task(bench: Bench) -> Found:
    """A soft prompt for each task, which is named at test time."""
    single, validation = [], []
    for name in tqdm(bench.stream, desc="one prompt per task"):
        model, training = prompt_tuning(bench)
        train(bench, model, name, [], **training)
        single += evaluate(bench, model, [name])
        validation += evaluate(bench, model, [name], "validation")
    return {"single": single, "matrix": never_forgotten(single), "validation": validation}


def never_forgotten(single: list[float]) -> list[list[float]]:
    """The score matrix of models that are kept apart."""
    return [[score if j <= i else float("nan") for j, score in enumerate(single)] for i in range(len(single))]


@dataclass
class Recipe:
    """A variant of SAPT: fields of its config, arguments of its [`ArmCallback`] (None: no callback at all), and
    whether keys and query projection learn at the blocks' rate, as released."""

    config: dict[str, Any] = field(default_factory=dict)
    arm: dict[str, Any] | None = field(default_factory=dict)
    released_rate: bool = False


RECIPES = {
    "sapt": Recipe(),
    "sapt-ridge": Recipe(config={"router": "ridge"}),
    "sapt-prompt": Recipe(config={"router": "ridge", "block": "prompt"}),
    "sapt-prompt-learned": Recipe(config={"block": "prompt"}),
    "sapt-real-rows": Recipe(arm={"replay": "rows"}),
    "sapt-no-gate": Recipe(arm={"gate_weight": 0.0}),
    "sapt-no-arm": Recipe(arm=None),
    # the release's loss: KL alone, nothing that opens the gate; its gradient, and one learning rate for everything
    "sapt-as-released": Recipe(
        config={"old_block_gradient": False}, arm={"gate_weight": 0.0, "align_steps": 0}, released_rate=True
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
    return ArmCallback(bench.tokenizer, **{"align_steps": budget.align_steps, "generator": settings, **arguments})


def learn_pool(bench: Bench, recipe: Recipe) -> tuple[PeftModel, ArmCallback | None, Found]:
    """A pool, its callback, and beside ``matrix``: ``train_weights`` [T][T], the mean attention on each task's
    training prompts when it had been learned; ``routing_by_stage`` and ``own_weight_by_stage``, both [T][T] like the
    matrix; ``mean_weights`` [T][T] and ``prompt_weights`` [T][N][T] on the scored prompts at the end; ``routing``,
    percent of prompts whose own block leads; ``gates_while_training``; ``pseudo_samples``, counts by task."""
    names = list(bench.stream)
    set_seed(bench.budget.seed)
    prompt = recipe.config.get("block") == "prompt"
    model = get_peft_model(bench.fresh(adapts_input=prompt), sapt_config(bench, **recipe.config))
    arm = None if recipe.arm is None else arm_for(bench, **recipe.arm)
    rate = bench.budget.lr if recipe.released_rate else bench.budget.attention_lr
    training = prompt_training(bench) if prompt else {"attention_lr": rate, "marks_prompts": True}
    matrix, gates, train_weights, by_stage = [], {}, [], []
    for stage, name in enumerate(tqdm(names, desc="SAPT")):
        if name not in model.tasks:
            model.add_task(name)
        callbacks = [] if arm is None else [arm]
        trainer = train(bench, model, name, callbacks, **training)
        gates[name] = [h[f"attention/{name}"] for h in trainer.state.log_history if f"attention/{name}" in h]
        mean = weights_of_prompts(bench, model, name, "train").mean(dim=0).tolist()
        train_weights.append(mean + [0.0] * (len(names) - stage - 1))
        matrix.append(stage_row(bench, model, stage))
        by_stage.append(routing_after(bench, model, stage))
    found = {"matrix": matrix, "validation": evaluate(bench, model, names, "validation")}
    routing, own = ([pair[i] for pair in by_stage] for i in (0, 1))
    found |= {"routing_by_stage": routing, "own_weight_by_stage": own, "train_weights": train_weights}
    found |= {**attention_of(bench, model), "gates_while_training": gates}
    return model, arm, found | {"pseudo_samples": {} if arm is None else pseudo_reports(bench, model, arm)}


def routing_after(bench: Bench, model: PeftModel, stage: int) -> tuple[list[float], list[float]]:
    """Percent of scored prompts whose own block leads, and their own block's mean weight, for the tasks so far."""
    names = list(bench.stream)
    attention = [weights_of_prompts(bench, model, name) for name in names[: stage + 1]]
    later = [float("nan")] * (len(names) - stage - 1)
    led = [100.0 * float((w.argmax(dim=1) == i).float().mean()) for i, w in enumerate(attention)]
    return led + later, [float(w[:, i].mean()) for i, w in enumerate(attention)] + later


def pseudo_reports(bench: Bench, model: PeftModel, arm: ArmCallback) -> Found:
    """The callback's counts, and counted anew at the end: kept texts that are a training prompt verbatim, and percent
    of kept pseudo-samples whose own block leads."""
    pool = pool_of(model)
    reports: Found = {}
    for i, (name, rows) in enumerate(zip(pool.tasks, pool.attention.replay(pool.pool_name), strict=True)):
        reports[name] = dict(arm.reports.get(name, {}))
        if name in arm.pseudo_samples:
            known = set(bench.tokenizer.batch_decode(bench.prompts(bench.stream[name]["train"])))
            reports[name]["kept_copies"] = sum(text in known for text in arm.pseudo_samples[name])
        if len(rows):
            leads = pool.prompt_router.attend(rows, pool.pool_name).argmax(dim=1) == i
            reports[name]["routed_to_own"] = 100.0 * float(leads.float().mean())
    return reports


def attention_of(bench: Bench, model: PeftModel) -> Found:
    names = list(bench.stream)
    attention = {name: weights_of_prompts(bench, model, name) for name in names}
    return {
        "mean_weights": [attention[name].mean(dim=0).tolist() for name in names],
        "prompt_weights": {n: [[float(f"{v:.4g}") for v in row] for row in attention[n].tolist()] for n in names},
        "routing": [100.0 * float((attention[n].argmax(dim=1) == i).float().mean()) for i, n in enumerate(names)],
    }


def _of_recipe(recipe: Recipe) -> Callable[[Bench], Found]:
    return lambda bench: learn_pool(bench, recipe)[2]


METHODS: dict[str, Callable[[Bench], Found]] = {
    "sequential": learn_sequential,
    "per-task": learn_per_task,
    "prompt-sequential": learn_prompt_sequential,
    "prompt-per-task": learn_prompt_per_task,
    **{name: _of_recipe(recipe) for name, recipe in RECIPES.items()},
}
