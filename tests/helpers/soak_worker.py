"""A process that adds, saves and loads many tasks, for test_soak.py, and prints what it measured as one line of JSON.

    python -m helpers.soak_worker ROUTER TASKS FOLDER [leak]

With ``leak`` it keeps what each round loaded, which the test must notice.

A process of its own, so that what other tests have left in the allocator is not measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel

from helpers.tiny import build_pool, padded, token_rows
from peft_sapt import save_pool
from peft_sapt.storage.manifest import digest

ROWS = [4, 5, 6, 7]
EVERY = 10  # rounds between two readings of the memory


def allocated() -> int:
    """Bytes that this process has allocated and touched; pages of libraries come and go as the system likes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator only keeps for later is not counted
    with open("/proc/self/status") as stream:
        values = dict(line.split(":", 1) for line in stream)
    return sum(int(values[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024


def first_pool(router: str):
    return build_pool("llama", ["t0"], task_ranks=[4], r=4, router=router, init_weights=router != "ridge")


def digests(model, name: str) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in model.task_state(name).items()}


def main(router: str, tasks: int, folder: Path, leak: bool) -> dict:
    model = first_pool(router)
    kept, bytes_of, leaked = {}, {}, []
    batches = [padded(token_rows(ROWS, seed=i)) for i in range(tasks)]
    times, memory, sizes, answers = [], [], [], 0
    for i in range(tasks):
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
        save_pool(model, folder / "pool")
        model = PeftModel.from_pretrained(first_pool(router).unload(), folder / "pool", is_trainable=True)
        times.append(time.perf_counter() - begun)
        sizes.append((folder / "pool" / "adapter_model.safetensors").stat().st_size)
        answers += kept[f"t{i}"].numel() * 4
        if leak:
            leaked.append(model)
        if i % EVERY == EVERY - 1:
            memory.append([i, allocated() - answers, sizes[-1]])
    drift = max(float((model.eval()(**batches[i], sapt_task=f"t{i}").logits - kept[f"t{i}"]).abs().max())
                for i in range(0, tasks, 7))  # fmt: skip
    found = {"router": router, "tasks": model.tasks, "times": times, "memory": memory, "sizes": sizes, "drift": drift,
             "changed": [n for n in model.tasks if digests(model, n) != bytes_of[n]]}  # fmt: skip

    last = f"t{tasks - 1}"
    for i in range(tasks - 1):
        model.remove_task(f"t{i}")
    with torch.no_grad():
        left = model.eval()(**batches[-1], sapt_task=last).logits
    save_pool(model, folder / "pruned")
    pruned = (folder / "pruned" / "adapter_model.safetensors").stat().st_size
    return found | {
        "left": model.tasks, "left_changed": digests(model, last) != bytes_of[last], "pruned_size": pruned,
        "left_drift": float((left - kept[last]).abs().max()),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    print(json.dumps(main(arguments[0], int(arguments[1]), Path(arguments[2]), arguments[3:] == ["leak"])))
