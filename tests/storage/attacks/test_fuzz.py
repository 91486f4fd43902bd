"""Every parser of files survives what helpers/fuzzing.py makes up, and nearly every line of it is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.campaigns import PARSERS, campaign
from helpers.fuzzing import Parser, covered, fuzz, parsers, scratch

pytestmark = pytest.mark.filterwarnings("ignore")  # there is one for nearly every case


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as name:
        yield Path(name)


def parser_named(name: str, folder: Path) -> Parser:
    return next(parser for parser in parsers(folder) if parser.name == name)


def attack(parser: Parser, cases: int) -> None:
    lines = covered(parser)
    outcomes, crashes = fuzz(parser, cases)
    print(f"{parser.name}: {cases} cases, {lines:.0f} % of its lines, {dict(outcomes)}", flush=True)
    assert not crashes, crashes
    assert lines >= 80, f"{lines:.0f} % of the lines of {parser.name} were run"


@pytest.mark.parametrize("name", PARSERS)
def test_a_thousand_cases(name: str, folder: Path) -> None:
    outcomes, crashes = fuzz(parser_named(name, folder), 1_000, seed=2)
    assert not crashes, crashes
    assert name == "checkpoint marker" or len(outcomes) >= 2, "cases must be both read and refused"


def test_no_parser_is_left_out(folder: Path) -> None:
    assert [parser.name for parser in parsers(folder)] == PARSERS


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_ten_thousand_cases(name: str, folder: Path) -> None:
    attack(parser_named(name, folder), 10_000)


@pytest.mark.campaign
def test_a_hundred_thousand_cases_for_every_parser(folder: Path) -> None:
    with campaign("fuzzing") as counts:
        for parser in parsers(folder):
            attack(parser, 100_000)
            counts[f"cases, {parser.name}"] += 100_000
