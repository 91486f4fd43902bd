"""Optimizer groups: blocks, attention and keys, each with its rate and decay."""

from __future__ import annotations

from helpers.tiny import build_pool
from helpers.training import arguments
from helpers.words import TASKS
from peft_sapt import create_optimizer, optimizer_groups


def test_optimizer_groups(tmp_path) -> None:
    model = build_pool("llama", TASKS)
    groups = {g["name"]: g for g in optimizer_groups(model, 1e-3, attention_lr=1e-2, weight_decay=0.1)}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "blocks": (1e-3, 0.1),
        "attention": (1e-2, 0.1),
        "keys": (1e-2, 0.0),
    }
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert id(model.base_model.attention.sapt_key["default"].weight) in map(id, groups["keys"]["params"])
    optimizer, scheduler = create_optimizer(model, arguments(tmp_path, weight_decay=0.1), attention_lr=1e-2)
    assert scheduler is None and [g["lr"] for g in optimizer.param_groups] == [5e-3, 1e-2, 1e-2]
