"""Private names of other libraries that the package uses, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import TrainerCallback

from helpers.imports import files_of
from helpers.paths import PACKAGE

BASES = (BaseTuner, BaseTunerLayer, PeftModel, PeftConfig, torch.nn.Module, TrainerCallback)
DOCUMENTED = {"_asdict", "_name_", "_value_", "_sort_order_"}  # of named tuples and enums, in Python's own manual
IN_PICKLES = {"_codecs", "_core", "_reconstruct", "_frombuffer"}  # as NumPy's are written, whoever reads them
TEXT = re.compile(r"_[a-z]+(_[a-z]+)+\.?")


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def defined_in(trees: list[ast.AST]) -> set[str]:
    """Private names that the package itself defines or sets."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.arg, ast.alias)):
            found.add(node.arg if isinstance(node, ast.arg) else node.asname or "")
    return {name for name in found if is_private(name)}


def used_in(tree: ast.AST) -> Iterator[str]:
    """Private names that a file mentions: imported, as an attribute, as a method, or as a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(is_private, parts)
        elif isinstance(node, ast.Import):
            yield from filter(is_private, (part for alias in node.names for part in alias.name.split(".")))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ClassDef):
            yield from (item.name for item in node.body if isinstance(item, ast.FunctionDef) and is_private(item.name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and TEXT.fullmatch(node.value):
            if node.value not in IN_PICKLES and not node.value.startswith("_sapt"):
                yield node.value.rstrip(".")


def of_others(folder: Path = PACKAGE) -> dict[str, set[str]]:
    """Name -> files that use it, without names that are the package's own and of no class that it derives from."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files_of(folder)}
    own, found = defined_in(list(trees.values())), {}
    for path, tree in trees.items():
        for name in used_in(tree):
            if name not in own or any(hasattr(base, name) for base in BASES) or hasattr(torch.nn.Module(), name):
                found.setdefault(name, set()).add(str(path.relative_to(folder)))
    return found
