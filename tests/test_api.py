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
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTuner
from transformers import TrainerCallback

from helpers.paths import ROOT
from peft_sapt import ArmCallback, SaptModel

ROOMS = ["", ".ops", ".routing", ".arm", ".hub", ".official", ".report"]  # each lists its public names
WHOLE = [".continual.metrics", ".errors", ".ops.reference"]  # every function and class without an underscore
SHAPE = re.compile(r"\[([A-Za-z]|\.\.\.)[\w .,+*|-]*\](?![\w(])|\bT x T\b|\bscalar\b")
SOURCE = re.compile(r"SAPT, |the paper|paper's|arXiv|identity of ridge|regression")
FORMULAS = [  # and where each is computed
    "routing.features.max_pool", "routing.attention.query_of", "routing.attention.AttentionRouter.log_weights_of",
    "routing.ridge.solve", "routing.ridge.left_out_scores", "ops.reference.weighted_lora",
    "arm.objective.attention_loss", "arm.objective.replay_divergence", "continual.metrics.average_performance",
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


def lacking(name: str) -> list[str]:
    """What the docstring of a public name does not say."""
    found = PUBLIC[name]
    doc = inspect.getdoc(found) or ""
    if len(doc) <= 20:
        return [f"{name} has no docstring"]
    if inspect.isclass(found):
        return []
    said = []
    types = " ".join(str(p.annotation) for p in inspect.signature(found).parameters.values())
    types += str(inspect.signature(found).return_annotation)
    if "Tensor" in types and not SHAPE.search(doc):
        said.append(f"{name} takes or gives tensors: its docstring must give their shapes")
    raises = any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(source_of(found)))
    if raises and not re.search(r"[Rr]aises|[Rr]efuse", doc):
        said.append(f"{name} raises: its docstring must say what and when")
    return said


def test_every_public_name_says_what_it_is() -> None:
    names = documented()
    violations = [violation for name in names for violation in lacking(name)]
    assert len(names) > 50 and not violations, "\n" + "\n".join(violations)


def with_source(path: str) -> bool:
    """Whether the function at this path, or what it stands in, names the source of its formula."""
    module, _, name = path.rpartition(".")
    try:
        holder: Any = importlib.import_module(f"peft_sapt.{module}")
    except ModuleNotFoundError:
        inner, _, cls = module.rpartition(".")
        holder = getattr(importlib.import_module(f"peft_sapt.{inner}"), cls)
    return any(SOURCE.search(inspect.getdoc(found) or "") for found in (getattr(holder, name), holder))


def test_every_formula_names_its_source() -> None:
    bare = [path for path in FORMULAS if not with_source(path)]
    assert not bare, f"no source of the formula: {bare}"


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path) -> None:
    script = str(ROOT / ".ci" / "api.py")
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "peft_sapt.html").is_file() and (tmp_path / "peft_sapt" / "pool" / "exchange.html").is_file()
    assert "add_task" in (tmp_path / "peft_sapt" / "model.html").read_text()
