"""Two processes: DDP through the stock Trainer and FSDP2 give the gradients of one process on the joined batch."""

from __future__ import annotations

import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.distributed.fsdp import FullyShardedDataParallel

from helpers.distributed_worker import KINDS, ROWS, open_pool
from helpers.gradients import ATTENTION, BLOCK, assert_same, gradients
from helpers.paths import environment
from helpers.tiny import padded
from helpers.words import collate, tokenizer
from peft_sapt import ArmCallback
from peft_sapt.errors import SaptError, TaskError


def run(mode: str, folder: Path, processes: int = 2) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        env = environment(OMP_NUM_THREADS="1")
        if processes > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "helpers.distributed_worker", mode, str(folder)]
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ddp_equals_one_process(kind: str, tmp_path) -> None:
    run(f"ddp-{kind}", tmp_path)
    run(f"single-{kind}", tmp_path, processes=1)
    zero, one, alone = (torch.load(tmp_path / f"{n}.pt") for n in ("2-0", "2-1", "1-0"))
    parts = {"": BLOCK + ATTENTION, "ridge": BLOCK, "centroid": BLOCK, "prompt": ("sapt_prompt", *ATTENTION)}[kind]
    assert_same(zero["first"], alone["first"], parts=parts)
    assert_same(one["first"], alone["first"], parts=parts)
    for key, value in zero["state"].items():
        assert torch.equal(value, one["state"][key]), f"{key} differs between the processes"
        torch.testing.assert_close(value, alone["state"][key], atol=2e-4, rtol=1e-3)
    base = open_pool(kind).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "pool-2")
    assert loaded.committed_tasks == ["a", "b", "c"]


@pytest.mark.slow
def test_fsdp2_equals_one_process(tmp_path) -> None:
    run("fsdp2", tmp_path)
    model = open_pool(features="mean").train()
    arm = ArmCallback(tokenizer(), replay="rows", align_steps=3)
    arm.prepare(model, [collate(ROWS)])
    penalty = arm.penalty(model)
    assert float(penalty.detach()) > 0.02
    (penalty + model(**collate(ROWS), use_cache=False).loss).backward()
    assert_same(torch.load(tmp_path / "fsdp2.pt"), gradients(model))
    loaded = PeftModel.from_pretrained(open_pool(features="mean").unload(), tmp_path / "pool").eval()
    with torch.no_grad():
        batch = padded([row["input_ids"] for row in ROWS])
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp1_serves_a_pool(kind: str, tmp_path) -> None:
    """With its default flags: parameters become flat ones, and plain tensors take their places."""
    model = open_pool(kind, features="mean").eval()
    batch = padded([row["input_ids"] for row in ROWS])
    expected = model(**batch).logits.detach()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and says that one process shards nothing
            sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        assert torch.equal(sharded(**batch).logits, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_and_sharded_models_are_refused(monkeypatch) -> None:
    model = open_pool()
    assert model.base_model.pool.config.features == "hidden"
    parameter = next(model.parameters())
    sharded = type("DTensor", (torch.nn.Parameter,), {})
    monkeypatch.setattr(parameter, "__class__", sharded, raising=False)
    with pytest.raises(SaptError, match=r"features='hidden'.*FSDP.*features='both'"):
        model(**padded([row["input_ids"] for row in ROWS]))
    with pytest.raises(TaskError, match="before FSDP wraps the model"):
        model.add_task("d")
