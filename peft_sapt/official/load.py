"""A pool of the official release as a pool of this package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from ..config import SaptConfig
from ..errors import OfficialCheckpointError
from ..routing.memory import freeze_committed
from .folders import Block, SavedTask, read_attention, read_tasks, read_tensors

NAMES = {"q": ("q_proj", "q"), "v": ("v_proj", "v")}  # of the projections in LLaMA and in T5
QUERY = {"0.weight", "1.weight", "3.weight", "3.bias"}


def load_official_checkpoint(
    base: Any,
    outputs: str | os.PathLike,
    lora_alpha: float = 32.0,
    temperature: float = 1.0,
    replay: Mapping[str, Iterable[Mapping[str, Tensor]] | Tensor] | None = None,
) -> PeftModel:
    """The pool that the official release has learned, on ``base``, oldest task first.

    Its logits are the release's on rows without padding; on padded rows they are those of the row alone, since padding
    does not enter the query here. Tasks are named after their folders. The attention targets come from
    ``attention_weights.pkl``; a task without one counts as committed to itself, the newest one stays open.

    Args:
        base: the model that the release was trained on; blocks go on its query and value projections.
        outputs: the release's ``outputs`` folder, with ``1-<task>/saved_weights`` and so on.
        lora_alpha: the release's, which its files do not hold.
        temperature: its ``attn_temperature``, as a factor of sqrt(d).
        replay: pseudo-samples by task, as batches or pooled prompts, [n, d], which ARM
            replays while it learns further ones.

    Raises:
        OfficialCheckpointError: a file is missing, asks for code, or does not fit the others or ``base``, which is
            then as it was.
    """
    tasks = read_tasks(Path(outputs))
    newest = tasks[-1]
    keys = read_tensors(newest.folder / "prompts_keys_till_now.pt")
    query = read_tensors(newest.folder / "trans_input.pt")
    check(tasks, keys, query, base)
    targets = targets_of(tasks)
    rank = next(iter(newest.a.values())).shape[0]
    short = {key: module_name(base, *key) for key in newest.a}
    config = SaptConfig(
        task_type="SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
        r=rank,
        lora_alpha=lora_alpha,
        tasks=[task.name for task in tasks],
        task_ranks=[next(iter(task.a.values())).shape[0] for task in tasks],
        target_modules=sorted(short.values()),
        query_dim=query["0.weight"].shape[0],
        temperature=temperature,
        features="max",
    )
    model: Any = get_peft_model(base, config)
    pool = model.base_model.pool
    layers = pool.layers()
    with torch.no_grad():
        attention = model.base_model.attention
        attention.sapt_query_down["default"].weight.copy_(query["0.weight"])
        attention.sapt_query_up["default"].weight.copy_(query["1.weight"])
        attention.sapt_query_norm["default"].weight.copy_(query["3.weight"])
        attention.sapt_query_norm["default"].bias.copy_(query["3.bias"])
        attention.put_parts("sapt_key", "default", list(keys.float().flip(0).split(1)))
        for key, name in short.items():
            layers[name].put_parts("sapt_A", "default", [task.a[key] for task in tasks])
            layers[name].put_parts("sapt_B", "default", [task.b[key].T for task in tasks])
        pool.memory.targets("default").copy_(targets)
        rows = [pool.pooled_prompts((replay or {}).get(task.name, [])) for task in tasks]
        pool.memory.set_replay("default", [r.to(targets.device) for r in rows])
    freeze_committed(pool.base)
    pool.refresh_trainable()
    return model


def targets_of(tasks: list[SavedTask]) -> Tensor:
    """Attention targets [T, T], oldest first, zero for later tasks; raises [`OfficialCheckpointError`]."""
    targets = torch.zeros(len(tasks), len(tasks))
    for index, task in enumerate(tasks):
        found = read_attention(task.folder / "attention_weights.pkl")
        if found is None:
            targets[index, index] = float(index < len(tasks) - 1)
        elif len(found) != index + 1 or found.min() < 0 or abs(found.sum() - 1) > 0.05:
            raise OfficialCheckpointError(
                f"{task.folder / 'attention_weights.pkl'} holds {found.tolist()}, which is no attention over "
                f"{index + 1} tasks."
            )
        else:
            targets[index, : index + 1] = torch.tensor(found[::-1].copy(), dtype=torch.float32)
    return targets


def module_name(base: Any, parent: str, part: str) -> str:
    """The base model's name for a projection of the release."""
    for candidate in (f"{parent}.{name}" for name in NAMES[part]):
        try:
            base.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise OfficialCheckpointError(f"The base model has no projection for {parent}.lora_{part}: it is another model.")


def check(tasks: list[SavedTask], keys: Any, query: Any, base: Any) -> None:
    """Raises [`OfficialCheckpointError`] unless everything that was read fits together and fits ``base``."""
    newest, width = tasks[-1], base.get_input_embeddings().weight.shape[1]
    if not isinstance(keys, Tensor) or keys.shape != (len(tasks), width):
        shape = list(keys.shape) if isinstance(keys, Tensor) else type(keys).__name__
        raise OfficialCheckpointError(
            f"{newest.folder / 'prompts_keys_till_now.pt'} holds {shape}, not one key of {width} for each of the "
            f"{len(tasks)} tasks {[task.name for task in tasks]}."
        )
    if not isinstance(query, dict) or set(query) != QUERY or query["1.weight"].shape[0] != width:
        where = newest.folder / "trans_input.pt"
        raise OfficialCheckpointError(f"{where} is no query projection for embeddings of {width}.")
    for task in tasks:
        if set(task.a) != set(newest.a):
            raise OfficialCheckpointError(f"{task.folder} adapts other layers than {newest.folder}.")
        for key, a in task.a.items():
            layer, b = base.get_submodule(module_name(base, *key)), task.b[key]
            wanted = (layer.weight.shape[1], layer.weight.shape[0])
            if (a.shape[1], b.shape[0]) != wanted or a.shape[0] != b.shape[1]:
                raise OfficialCheckpointError(
                    f"{task.folder}: {'.'.join(key)} has factors {list(a.shape)} and {list(b.shape)}, the base model "
                    f"a layer of {wanted[0]} -> {wanted[1]}: it is not the one of this pool."
                )
    repeats_agree(tasks)


def repeats_agree(tasks: list[SavedTask]) -> None:
    """Raises [`OfficialCheckpointError`] if the newest folder repeats an older block otherwise than its own has it."""
    newest = tasks[-1]
    for older, repeated_a, repeated_b in zip(tasks[-2::-1], newest.older_a, newest.older_b, strict=False):
        if not (same(older.a, repeated_a) and same(older.b, repeated_b)):
            raise OfficialCheckpointError(
                f"{newest.folder} repeats the block of {older.name!r} otherwise than {older.folder} has it: the "
                "folders are of different runs."
            )


def same(one: Block, other: Block) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
