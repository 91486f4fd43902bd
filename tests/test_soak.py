"""200 tasks added, saved, loaded and pruned in one process: memory, time and old answers."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import build_pool, padded, token_rows

from peft_sapt import save_pool
from peft_sapt.manifest import digest

TASKS = 200
ROWS = [4, 5, 6, 7]
SLACK = 24 * 2**20  # bytes that an allocator may keep


def resident() -> int:
    """Bytes that this process has allocated and touched; pages of libraries come and go as the system likes."""
    gc.collect()
    with open("/proc/self/status") as stream:
        values = dict(line.split(":", 1) for line in stream)
    return sum(int(values[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024


def first_pool(router: str):
    return build_pool("llama", ["t0"], task_ranks=[4], r=4, router=router, init_weights=router != "ridge")


def digests(model, name: str) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in model.task_state(name).items()}


@pytest.mark.slow
@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_two_hundred_tasks(router: str, tmp_path) -> None:
    model = first_pool(router)
    kept: dict[str, torch.Tensor] = {}
    bytes_of: dict[str, dict[str, str]] = {}
    batches = [padded(token_rows(ROWS, seed=i)) for i in range(TASKS)]
    times, memory, sizes = [], [], []
    for i in range(TASKS):
        begun = time.perf_counter()
        if i:
            model.add_task(f"t{i}")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".sapt_B." in name:
                    parameter.normal_(std=0.1)
        model.commit_task(inputs=[batches[i]], replay=[batches[i]] if router == "attention" else None)
        bytes_of[f"t{i}"] = digests(model, f"t{i}")
        with torch.no_grad():
            kept[f"t{i}"] = model.eval()(**batches[i], sapt_task=f"t{i}").logits.clone()
        save_pool(model, tmp_path / "pool")
        model = PeftModel.from_pretrained(first_pool(router).unload(), tmp_path / "pool", is_trainable=True)
        times.append(time.perf_counter() - begun)
        sizes.append((tmp_path / "pool" / "adapter_model.safetensors").stat().st_size)
        if i >= 20 and i % 20 == 0:
            memory.append((i, resident()))
    assert model.tasks == [f"t{i}" for i in range(TASKS)]
    drift = max(float((model.eval()(**batches[i], sapt_task=f"t{i}").logits - kept[f"t{i}"]).abs().max())
                for i in range(0, TASKS, 7))  # fmt: skip
    (first, low), (last, high) = memory[0], memory[-1]
    grown, own = high - low, sizes[last] - sizes[first]
    early, late = float(np.median(times[40:80])), float(np.median(times[-40:]))
    answers = sum(t.numel() * 4 for t in list(kept.values())[first:last])  # which this test itself keeps
    print(
        f"{router}: {TASKS} tasks, {sizes[-1] / 2**20:.1f} MiB on disk, memory {grown / 2**20:+.1f} MiB for "
        f"+{own / 2**20:.1f} MiB of pool, {early * 1e3:.0f} ms per task at 40-80, {late * 1e3:.0f} ms at 160-200, "
        f"drift {drift:.1e}"
    )
    assert all(digests(model, name) == bytes_of[name] for name in model.tasks), "an old task's bytes have changed"
    assert drift <= 2e-6, "an old task answers differently"  # a longer sum is added up in another order, no more
    assert grown <= 3 * own + answers + SLACK, "memory grows beyond the pool's own bytes"
    assert late <= early * (180 / 60) * 1.5, "time per task grows faster than the pool"
    for i in range(0, TASKS - 1):
        model.remove_task(f"t{i}")
    assert model.tasks == [f"t{TASKS - 1}"]
    with torch.no_grad():
        left = model.eval()(**batches[-1], sapt_task=f"t{TASKS - 1}").logits
    assert digests(model, f"t{TASKS - 1}") == bytes_of[f"t{TASKS - 1}"], "pruning changed the task that stayed"
    torch.testing.assert_close(left, kept[f"t{TASKS - 1}"], atol=2e-6, rtol=0)
    save_pool(model, tmp_path / "pruned")
    assert (tmp_path / "pruned" / "adapter_model.safetensors").stat().st_size < 1.6 * sizes[0] + 200_000
