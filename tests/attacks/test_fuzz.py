"""Every parser of files survives what fuzzing.py makes up; 100,000 cases each, and nearly every line of it is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import covered, fuzz, parsers, scratch

CASES = 100_000
NAMES = ["manifest", "config", "weights header", "JSONL stream", "checkpoint marker", "generator", "results",
         "LoRA folder", "soft prompt", "released pickle"]  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as name:
        yield Path(name)


def parser_named(name: str, folder: Path):
    return next(parser for parser in parsers(folder) if parser.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_cases(name: str, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes, crashes = fuzz(parser_named(name, folder), 1_000, seed=2)
    assert not crashes, crashes
    assert name == "checkpoint marker" or len(outcomes) >= 2, "cases must be both read and refused"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand_cases(name: str, folder: Path) -> None:
    parser = parser_named(name, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = covered(parser)
        outcomes, crashes = fuzz(parser, CASES)
    print(f"{name}: {CASES} cases, {lines:.0f} % of its lines, {dict(outcomes)}")
    assert not crashes, crashes
    assert lines >= 80, f"{lines:.0f} % of the parser's lines were run"
