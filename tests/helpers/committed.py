"""Pools whose tasks are committed, as they are saved, carried to the Hub and damaged."""

from __future__ import annotations

from peft import PeftModel

from helpers.tiny import build_pool, padded, token_rows


def committed_pool(router: str = "attention", **more):
    model = build_pool("llama", ["a"], router=router, task_ranks=[3], init_weights=router == "ridge", **more)
    for seed, name in enumerate(["a", "b", "c"]):
        if name != "a":
            model.add_task(name, r=3)
        batches = [padded(token_rows([4, 5, 6, 7], seed=seed))]
        model.commit_task(inputs=batches, replay=batches if router == "attention" else None)
    return model


def pool_of(tasks: int = 2) -> PeftModel:
    """Its first two or all three tasks."""
    model = committed_pool()
    for name in "cb"[: 3 - tasks]:
        model.remove_task(name)
    return model
