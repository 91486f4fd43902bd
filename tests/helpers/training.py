"""The stock Trainer on a tiny pool: its arguments, a stream of tasks, and the weights that prompts get afterwards."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from helpers.tiny import tiny_llama
from helpers.words import TASKS, collate, prompts_of, rows_of
from peft_sapt import ArmCallback, GeneratorSettings, SaptConfig, create_optimizer

FAST = GeneratorSettings(epochs=30, learning_rate=1e-2, lora_dropout=0.0)


def arguments(folder, **settings) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(model, folder, task: str, callbacks, **settings) -> Trainer:
    args = arguments(folder, **settings)
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows_of(task),
        data_collator=collate,
        callbacks=callbacks,
        optimizers=create_optimizer(model, args, attention_lr=1e-3),
    )


def fresh_pool(**config):
    torch.manual_seed(0)
    base = tiny_llama()
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    return get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", task_name="a", **config))


def learn_stream(folder, arm: ArmCallback, tasks=TASKS):
    model, scales = fresh_pool(), {}
    for task in tasks:
        if task not in model.tasks:
            model.add_task(task)
        run = trainer(model, folder, task, [arm])
        run.train()
        scales[task] = [h[f"attention/{task}"] for h in run.state.log_history if f"attention/{task}" in h]
    return model.eval(), scales


def own_weights(model) -> dict[str, tuple[float, float]]:
    """For held-out prompts of each task: share led by its own block, and that block's mean weight."""
    found = {}
    for i, task in enumerate(model.tasks):
        weights = model.attention_weights(**prompts_of(task, seed=1))
        found[task] = (float((weights.argmax(1) == i).float().mean()), float(weights[:, i].mean()))
    return found
