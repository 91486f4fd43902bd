"""A tiny pool on disk with its base model and tokenizer, as the examples that serve one expect it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from helpers.tiny import build_pool
from helpers.words import MARKS, prompts_of, tokenizer

TASKS = ["a", "b", "c"]


def save_pool(folder: Path, router: str = "ridge", **config) -> Path:
    """Three random blocks under a router that tells the three vocabularies apart; returns the pool's folder."""
    base = folder / "base"
    model = build_pool("llama", ["a"], router=router, task_ranks=[2], init_weights=True, **config)
    model.base_model.model.config._name_or_path = model.base_model.model.name_or_path = str(base)
    for name in TASKS:
        if name not in model.tasks:
            model.add_task(name, r=2)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".sapt_B." in key:
                    parameter.normal_(std=0.5)
        batch = prompts_of(name, seed=1)
        model.commit_task(inputs=[batch], replay=[batch] if router == "attention" else None)
    model.save_pretrained(folder / "pool")
    (folder / "pool" / "replay").mkdir()
    for name in TASKS:
        text = json.dumps({"text": prompt_of(name)})
        (folder / "pool" / "replay" / f"{name}.jsonl").write_text(text + "\n")
    model.unload().save_pretrained(base)
    tokenizer().save_pretrained(base)
    return folder / "pool"


def prompt_of(task: str) -> str:
    return " ".join(f"w{i}" for i in list(MARKS[task])[5:12]) + " w5"
