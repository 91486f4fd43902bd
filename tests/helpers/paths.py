"""Folders of the project, and the environment of a process that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PACKAGE, EXAMPLES, RESULTS = ROOT / "peft_sapt", ROOT / "examples", ROOT / "examples" / "results"
PATHS = [str(ROOT), str(TESTS)]  # where another process finds the package and these helpers


def environment(**more: str) -> dict[str, str]:
    """This process's, with the package and these helpers on the path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), **more}
