"""Which implementation runs: by name, by environment, by what the machine has; never another one than asked for."""

from __future__ import annotations

import builtins
import logging
import subprocess
import sys

import pytest
import torch

from helpers.paths import environment
from helpers.tiny import build_pool, padded, token_rows
from peft_sapt import SaptConfig
from peft_sapt.errors import KernelError
from peft_sapt.ops import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch.say_once.cache_clear()
    dispatch.why_not_triton.cache_clear()


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_name_is_obeyed(name: str) -> None:
    assert dispatch.choose(name, CPU, torch.float32) == name


def test_auto_says_once_why_it_fell_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        assert dispatch.choose("auto", CPU, torch.float32) == "torch"
        assert dispatch.choose("auto", CPU, torch.float32) == "torch"
    assert len(caplog.records) == 1 and "not on a CUDA device" in caplog.text


def test_triton_by_name_raises_with_the_reason() -> None:
    with pytest.raises(KernelError, match=r"tensors are on 'cpu'.*kernel='auto' or 'torch'"):
        dispatch.choose("triton", CPU, torch.float32)
    with pytest.raises(KernelError, match=r"not in torch\.float64"):
        dispatch.choose("triton", torch.device("cuda", 0), torch.float64)


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(KernelError, match=r"compute capability 7\.5"):
        dispatch.choose("triton", torch.device("cuda", 0), torch.float16)
    assert dispatch.choose("auto", torch.device("cuda", 0), torch.float16) == "torch"
    assert caplog.records[-1].levelno == logging.WARNING  # it could be faster there
    dispatch.why_not_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert dispatch.choose("auto", torch.device("cuda", 0), torch.float16) == "triton"


@pytest.mark.parametrize("how", ["older", "broken"])
def test_a_triton_that_cannot_compile_them_is_named(how: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """3.1, as torch 2.5 has it; 3.2 without setuptools, which it imports and nothing installs with it."""
    gpu, known = torch.device("cuda", 0), builtins.__import__

    def without_setuptools(name: str, *rest):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'setuptools'")
        return known(name, *rest)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    if how == "older":
        monkeypatch.setattr("triton.__version__", "3.1.0")
    else:
        monkeypatch.setattr(builtins, "__import__", without_setuptools)
    assert dispatch.choose("auto", gpu, torch.float16) == "torch"
    assert caplog.records[-1].levelno == logging.WARNING
    reason = {"older": r"Triton 3\.1\.0 is older than 3\.2", "broken": r"cannot be imported \(No module named 'setup"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # on a CPU likewise
    for device in (gpu, CPU):
        with pytest.raises(KernelError, match=reason[how] + r".*kernel='auto' or 'torch'"):
            dispatch.choose("triton", device, torch.float16)
    assert dispatch.choose("auto", CPU, torch.float16) == "torch"


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.wanted_kernel("torch") == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(KernelError, match=r"PEFT_SAPT_KERNEL names kernel 'cuda'"):
        dispatch.wanted_kernel("torch")


def test_an_unknown_name_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="kernel"):
        SaptConfig(task_name="a", kernel="cuda")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_config_reaches_the_op(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = build_pool(family, ["a", "b", "c"]).eval()
    inputs = padded(token_rows([5, 8, 6]))
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        fast = pool(**inputs).logits
        monkeypatch.setenv(dispatch.VARIABLE, "reference")
        slow = pool(**inputs).logits
        monkeypatch.setenv(dispatch.VARIABLE, "triton")
        with pytest.raises(KernelError):
            pool(**inputs)
    assert not torch.equal(fast, slow)  # two implementations did run
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from helpers.tiny import build_pool, padded, token_rows
pool = build_pool("llama", ["a", "b"]).train()
inputs = padded(token_rows([5, 8]))
labels = inputs["input_ids"].clone()
labels[:, :-2] = -100
pool(**inputs, labels=labels).loss.backward()
assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in pool.named_parameters() if ".sapt_B." in n)
assert "triton" not in sys.modules
from peft_sapt.ops import dispatch
print(dispatch.why_not_triton("cuda", 0, torch.float16))
"""


def test_import_and_train_without_triton() -> None:
    command = [sys.executable, "-c", WITHOUT]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(HF_HUB_OFFLINE="1"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Triton is not installed" in run.stdout
