"""The benchmarks run, at sizes that say nothing about speed: what they compare is what they name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.paths import EXAMPLES, environment
from helpers.tiny import tiny_llama
from peft_sapt.ops.devtools.floors import Shape

PEERS = {"plain LoRA (one block)", "pool, torch", "naive loop", "X-LoRA", "Arrow"}


@pytest.fixture
def kernels_script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import bench_kernels

    return bench_kernels


def run(script: str, *arguments: str, out: Path) -> tuple[str, dict]:
    command = [sys.executable, str(EXAMPLES / script), *arguments, "--json", str(out / "found.json")]
    env = environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((out / "found.json").read_text())


def test_peers_compute_the_same_sum_before_they_are_timed(kernels_script, capsys, monkeypatch) -> None:
    top = kernels_script.timings.Ceilings(1e10, 1e11)
    shape = Shape(2, 3, 32, 24, 4, 2)
    found = kernels_script.compare(shape, torch.float32, "cpu", 2, top)
    assert set(found["errors"]) == {"pool, torch", "naive loop", "X-LoRA"} and max(found["errors"].values()) < 1e-6
    assert set(found["forward"]) == set(found["forward and backward"]) == PEERS
    assert all(len(times) == 2 for times in found["forward"].values())
    monkeypatch.setattr(kernels_script, "naive_sum", lambda x, base, *rest: base)
    with pytest.raises(SystemExit, match=r"wrong before any timing.*naive loop"):
        kernels_script.compare(shape, torch.float32, "cpu", 2, top)


def test_a_loss_is_named(kernels_script) -> None:
    times = {name: [1.0, 1.0] for name in PEERS}
    found = {"forward": {**times, "X-LoRA": [0.5, 0.5]}, "forward and backward": times}
    assert kernels_script.losses({"a shape": found}) == ["a shape, forward: 2.00 times the time of X-LoRA"]


@pytest.mark.slow
def test_the_step_benchmark(tmp_path: Path) -> None:
    sizes = ("--tasks", "3", "--rounds", "2", "--batch", "2", "--source", "8", "--target", "4")
    printed, found = run("bench_step.py", *sizes, out=tmp_path)
    names = {"plain LoRA", "pool", "pool, gradient cut as in the official code", "naive loop"}
    assert set(found["tasks"]["3"]["seconds"]) == names and all(f"| {name} |" in printed for name in names)
    saved = found["tasks"]["3"]["saved_bytes"]
    assert saved["pool"] < saved["naive loop"]


@pytest.mark.slow
def test_the_generation_benchmark(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})), eos_token="a")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")
    sizes = ("--model", str(tmp_path / "model"), "--prompt", "6", "--rank", "2", "--rounds", "2")
    printed, found = run(
        "bench_generate.py", *sizes, "--tasks", "3", "--batch", "2", "--new", "3", "--slow-rounds", "2", out=tmp_path
    )
    assert set(found["seconds"]["slow"]) == {"plain LoRA", "pool, without cache", "X-LoRA (has no cache)"}
    assert set(found["seconds"]["fast"]) == {"plain LoRA", "pool", "pool, one task by name", "Arrow"}
    assert all(len(s) == 2 for group in found["seconds"].values() for s in group.values())
    printed, _ = run("bench_generate.py", *sizes, "--long", "3", "40", out=tmp_path)
    assert (
        "recorded own weights" in printed and "| T = 40, min_weight 0.01 |" in printed and "blocks dropped" in printed
    )
    printed, _ = run("bench_generate.py", *sizes, "--long", "3", "40", "--step", out=tmp_path)
    assert "ms per task" in printed
