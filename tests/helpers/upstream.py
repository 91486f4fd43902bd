"""What upstream refuses in the installed combination of versions, each found out on plain PEFT or transformers."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from helpers.paths import environment
from helpers.tiny import PAD, tiny_llama


def own_adapters_refused() -> bool:
    """Whether this transformers turns this PEFT down for adapters of its own, plain LoRA included."""
    try:
        tiny_llama().add_adapter(LoraConfig(task_type="CAUSAL_LM"))
    except ValueError as error:
        return "version of PEFT" in str(error)
    return False


PLAIN_KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def count(out_ptr, n):
    total = 0
    for i in range(0, n):
        total += i
    tl.store(out_ptr, total)

out = torch.zeros(1, dtype=torch.int32)
count[(1,)](out, 4)
assert int(out) == 6
"""


def loops_fail_in_the_interpreter() -> bool:
    """Whether a plain kernel with a loop fails in Triton's interpreter, as that of 3.2 does with NumPy 2.5."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "plain.py")  # the interpreter reads a kernel's source
        script.write_text(PLAIN_KERNEL, encoding="utf-8")
        run = subprocess.run([sys.executable, script], env=environment(TRITON_INTERPRET="1"), capture_output=True)
    return run.returncode != 0


def peft_loses_its_own_prompt() -> bool:
    """Whether PEFT's prompt tuning generates other tokens on a cache than without, as 0.21.2 on transformers 5.24."""
    torch.manual_seed(1)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, ids = get_peft_model(tiny_llama(), settings).eval(), torch.arange(5, 25).view(4, 5)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    return not torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


# torch 2.6 shards on a CPU only as far as its first unsharding, in which it asks torch.cpu.Stream for what that lacks
fsdp2_on_cpu = pytest.mark.xfail(
    not hasattr(torch.cpu.Stream(), "record_event"),
    raises=AttributeError,
    strict=True,
    reason="this torch cannot run fully_shard on a CPU, of a plain nn.Linear neither",
)
transformers_adapters = pytest.mark.xfail(
    own_adapters_refused(),
    raises=ValueError,
    strict=True,
    reason="this transformers asks for a newer PEFT, for plain LoRA too",
)
