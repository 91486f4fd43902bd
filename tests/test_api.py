"""The API reference: it builds without a warning, and says of every public name what it takes, gives and raises."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTuner
from transformers import TrainerCallback

from peft_sapt import ArmCallback, SaptModel

ROOT = Path(__file__).parents[1]
ROOMS = ["", ".ops", ".reflection", ".hub", ".release", ".report", ".card"]  # each lists its public names
WHOLE = [".continual.metrics", ".errors", ".ops.reference"]  # every function and class without an underscore
SHAPE = re.compile(r"\[([A-Za-z]|\.\.\.)[\w .,+*|-]*\](?![\w(])|\bT x T\b|\bscalar\b")
SOURCE = re.compile(r"SAPT, |the paper|paper's|arXiv|identity of ridge|regression")
FORMULAS = [  # and where each is computed
    "attention.max_pool", "attention.query_of", "attention.SharedAttention.log_weights", "ridge.solve",
    "ridge.left_out_scores", "ops.reference.weighted_lora", "reflection.objective.attention_loss",
    "reflection.objective.replay_divergence", "continual.metrics.average_performance",
    "continual.metrics.forgetting_rate", "continual.metrics.backward_transfer", "continual.metrics.forward_transfer",
]  # fmt: skip


def named() -> Iterator[tuple[str, Any]]:
    """Public names and what they stand for."""
    for room in ROOMS:
        module = importlib.import_module(f"peft_sapt{room}")
        yield from ((f"peft_sapt{room}.{name}", getattr(module, name)) for name in module.__all__)
    for room in WHOLE:
        module = importlib.import_module(f"peft_sapt{room}")
        for name, found in vars(module).items():
            if inspect.isroutine(found) or inspect.isclass(found):
                if not name.startswith("_") and found.__module__ == module.__name__:
                    yield f"peft_sapt{room}.{name}", found
    for cls, theirs in ((SaptModel, BaseTuner), (ArmCallback, TrainerCallback)):
        for name in dir(cls):
            found = inspect.getattr_static(cls, name)
            inner = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
            ours = (getattr(inner, "__module__", None) or "").startswith("peft_sapt")
            if ours and not name.startswith("_") and not hasattr(theirs, name):
                yield f"{cls.__name__}.{name}", inner


PUBLIC = {name: found for name, found in named() if inspect.isroutine(found) or inspect.isclass(found)}
THEIRS = ("PeftModel", "AutoPeftModel")  # re-exported from PEFT


def documented() -> list[str]:
    return [name for name in PUBLIC if not any(part in name for part in THEIRS)]


def source_of(found: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(found)))


@pytest.mark.parametrize("name", documented())
def test_every_public_name_says_what_it_is(name: str) -> None:
    found = PUBLIC[name]
    doc = inspect.getdoc(found) or ""
    assert len(doc) > 20, f"{name} has no docstring"
    if inspect.isclass(found):
        return
    types = " ".join(str(p.annotation) for p in inspect.signature(found).parameters.values())
    types += str(inspect.signature(found).return_annotation)
    if "Tensor" in types:
        assert SHAPE.search(doc), f"{name} takes or gives tensors: its docstring must give their shapes"
    if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(source_of(found))):
        assert re.search(r"[Rr]aises|[Rr]efuse", doc), f"{name} raises: its docstring must say what and when"


@pytest.mark.parametrize("path", FORMULAS)
def test_every_formula_names_its_source(path: str) -> None:
    module, _, name = path.rpartition(".")
    try:
        holder: Any = importlib.import_module(f"peft_sapt.{module}")
    except ModuleNotFoundError:
        inner, _, cls = module.rpartition(".")
        holder = getattr(importlib.import_module(f"peft_sapt.{inner}"), cls)
    doc = inspect.getdoc(getattr(holder, name)) or ""
    where = inspect.getdoc(holder) or ""
    assert SOURCE.search(doc) or SOURCE.search(where), f"{path} gives no source of its formula"


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path) -> None:
    script = str(ROOT / ".ci" / "api.py")
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "peft_sapt.html").is_file() and (tmp_path / "peft_sapt" / "exchange.html").is_file()
    assert "add_task" in (tmp_path / "peft_sapt" / "tasks.html").read_text()
