"""The house itself: imports run one way, files stay small, one file touches PEFT's namespace, the README runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_sapt"
ORDER = [
    "version", "errors", "files", "overrides", "weights_file", "manifest", "fingerprint", "validation", "records",
    "card", "config_file", "registration", "hub", "ops",
    "config", "pool", "checkpointing", "prompt_mask", "packing", "collator", "weights", "ridge", "low_rank",
    "closed_form", "attention", "stored_attention", "pooling", "mixture", "soft_prompt", "routing", "layer", "pool_io",
    "reading", "task_names", "tasks", "warm_start", "lora_folder", "prompt_folder", "exchange", "saving", "model",
    "saver",    "optimizer", "release", "reflection", "continual", "report", "cli",
]  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms of the package that a file imports from."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = [*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else [])]
            found |= {package[0]} if package else {alias.name for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for other in imports_of(path) - {room}:
        assert ORDER.index(other) < ORDER.index(room), f"{path.name} imports from {other}, which comes later"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_one_file_writes_to_pefts_namespace() -> None:
    writers = [
        p.name for p in FILES if re.search(r"type\.__setattr__|_member_map_|register_peft_method", p.read_text())
    ]
    assert writers == ["registration.py"]


def test_public_functions_have_docstrings() -> None:
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and len(node.body) > 4:
                    bare.append(f"{path.name}:{node.name}")
        assert ast.get_docstring(tree) or path.stat().st_size == 0, path
    assert not bare


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.splitlines()}
    named = {"peft_sapt", "examples", "tests", "setup.cfg", "pyproject.toml", "CHANGELOG.md", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == named


def readme_blocks() -> list[str]:
    """Of the README, and of the package's guide, which goes on from it."""
    guides = (ROOT / "README.md").read_text() + (PACKAGE / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", guides, flags=re.S)


def test_the_guides_python_runs() -> None:
    """Blocks of the guides beside the code define what they show, without a model."""
    [block] = re.findall(r"```python\n(.*?)```", (PACKAGE / "continual" / "README.md").read_text(), flags=re.S)
    names: dict[str, object] = {"__name__": "guide"}
    exec(block, names)
    from peft_sapt.continual.method import Method

    assert issubclass(names["Patient"], Method)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path) -> None:
    """All Python blocks in one process, in order, on tiny models in place of downloads."""
    prelude = (ROOT / "tests" / "readme_prelude.py").read_text()
    code = prelude + "\n" + "\n".join(readme_blocks())
    assert len(readme_blocks()) >= 3
    path = [str(ROOT), str(ROOT / "tests")]
    script = f"import sys; sys.path[:0] = {path!r}\n{code}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
