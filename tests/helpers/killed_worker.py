"""Processes that test_kills.py kills: one that loads, commits and saves a tiny pool, and one that learns a stream.

python -m helpers.killed_worker FOLDER      learn with checkpoints, going on from where it was left
"""

from __future__ import annotations

import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.tiny import build_pool, tiny_llama
from helpers.words import collate, prompts_of, rows_of, tokenizer
from peft_sapt import ArmCallback, GeneratorSettings, SaptConfig, create_optimizer, last_complete_checkpoint, save_pool

TASKS = ["a", "b", "c"]


def fresh_base():
    return build_pool("llama", ["a", "b"]).unload()


def grown(model: PeftModel) -> PeftModel:
    """One more task, learned and committed; the same one whoever does it."""
    torch.manual_seed(7)
    model.add_task("c")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sapt_B." in name:
                parameter.normal_(std=0.3)
    model.commit_task(inputs=[prompts_of("c", seed=1)], replay=[prompts_of("c", seed=2)])
    return model


@lru_cache
def state(number: int) -> PeftModel:
    """The pool before (0) and after (1) its third task."""
    model = build_pool("llama", ["a", "b"])
    model.commit_task(inputs=[prompts_of("b", seed=1)], replay=[prompts_of("b", seed=2)])
    return grown(model) if number else model


def go_on_forever(how: str, folder: Path, done: Connection) -> None:
    """Load the pool, commit a third task or take it out again, save; and send the number of each round."""
    torch.set_num_threads(1)
    for i in range(10_000):
        model = PeftModel.from_pretrained(fresh_base(), folder, is_trainable=True)
        if "c" in model.tasks:
            model.remove_task("c")
        else:
            grown(model)
        if how == "ours":
            save_pool(model, folder)
        else:
            model.save_pretrained(folder)
        done.send(i)


class Phases(TrainerCallback):
    """Says what begins, so that a kill can be aimed at it."""

    def __init__(self, task: str) -> None:
        self.task = task

    def on_step_end(self, *args, **kwargs) -> None:
        print("training", self.task, flush=True)

    def on_train_end(self, *args, **kwargs) -> None:
        print("reflecting", self.task, flush=True)


def first_pool() -> PeftModel:
    torch.manual_seed(0)
    base = tiny_llama()
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    return get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", task_name="a"))


def learn(folder: Path) -> None:
    """Tasks that are saved are not learned again; one that is under way goes on from its last complete checkpoint."""
    pool = folder / "pool"
    model = first_pool()
    if (pool / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model.unload(), pool, is_trainable=True)
    for name in TASKS:
        if name in model.committed_tasks:
            continue
        if name not in model.tasks:
            torch.manual_seed(len(model.tasks))
            model.add_task(name)
        args = TrainingArguments(
            output_dir=str(folder / f"trainer-{name}"), max_steps=8, save_steps=2, per_device_train_batch_size=8,
            learning_rate=5e-3, report_to="none", use_cpu=True, disable_tqdm=True, seed=0, logging_steps=4,
        )  # fmt: skip
        arm = ArmCallback(
            tokenizer(),
            replay="generated",
            generator=GeneratorSettings(epochs=20, learning_rate=2e-2, lora_dropout=0.0),
        )
        trainer = Trainer(
            model=model, args=args, train_dataset=rows_of(name), data_collator=collate, callbacks=[Phases(name), arm],
            optimizers=create_optimizer(model, args, attention_lr=1e-3),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
        save_pool(model, pool, arm)
        print("saved", name, flush=True)
        print("evaluating", name, flush=True)
        with torch.no_grad():
            for task in model.tasks:
                model.eval().generate(**prompts_of(task, seed=5), max_new_tokens=2)
        model.train()
    print("done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    learn(Path(sys.argv[1]))
