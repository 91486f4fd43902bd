"""One of two gloo processes of tests/arm/test_processes.py: python -m helpers.distributed_worker MODE FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from helpers.gradients import Record
from helpers.tiny import build_pool
from helpers.training import arguments
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback, create_optimizer

ROWS = [row for row in rows_of("c", count=80) if len(row["input_ids"]) == 9][:8]  # equal lengths: equal loss weights


assert len(ROWS) == 8


KINDS = {
    "": {},
    "ridge": {"router": "ridge"},
    "centroid": {"router": "centroid"},
    "prompt": {"block": "prompt", "num_virtual_tokens": 3},
}


def open_pool(kind: str = "", **fields):
    """Two committed tasks with replay rows, and a third that trains."""
    model = build_pool("llama", ["a"], **KINDS[kind], **fields)
    for name in ("b", "c"):
        rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(ord(name)))
        model.commit_task(rows, replay=rows if model.base_model.router.needs_replay else None)
        model.add_task(name)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "sapt_B"):
                layer.sapt_B["default"].weight.normal_(std=0.1, generator=rng)
    return model


def ddp(folder: Path, kind: str, processes: int = 2) -> None:
    """One optimizer step of the stock Trainer with ARM; then training goes on to the commit."""
    model = open_pool(kind)
    arm, record = ArmCallback(tokenizer(), replay="rows", align_steps=20), Record()
    args = arguments(
        folder / "trainer",
        max_steps=3,
        max_grad_norm=0,
        per_device_train_batch_size=8 // processes,
        learning_rate=1e-3,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=ROWS,
        data_collator=collate,
        callbacks=[arm, record],
        optimizers=create_optimizer(model, args),
    )
    assert args.world_size == processes
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(ROWS)
    trainer.train()
    assert model.committed_tasks == ["a", "b", "c"]
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save({"first": record.first, "state": model.state_dict()}, folder / f"{processes}-{rank}.pt")
    if rank == 0:
        model.save_pretrained(folder / f"pool-{processes}")


def fsdp2(folder: Path, kind: str) -> None:
    """Gradients of one step under fully_shard, ARM's term included, and a pool saved from the shards."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    model = open_pool(features="mean").train()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    arm = ArmCallback(tokenizer(), replay="rows", align_steps=3)
    arm.prepare(model, [collate(ROWS)])
    arm.penalty(model).backward()
    half = collate(ROWS[rank * 4 : rank * 4 + 4])
    model(**half, use_cache=False).loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(found, folder / "fsdp2.pt")
        model.save_pretrained(folder / "pool", state_dict=state)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (mode, _, kind), target = sys.argv[1].partition("-"), Path(sys.argv[2])
    {"ddp": ddp, "single": lambda f, k: ddp(f, k, processes=1), "fsdp2": fsdp2}[mode](target, kind)
