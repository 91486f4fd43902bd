"""The guides: the README stays short and in order, links lead somewhere, and the guides agree with each other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = [
    "Install", "Two commands", "Learn a stream", "Load and answer", "Which router", "Results", "Supported", "Guides",
    "Versions", "Citation",
]  # fmt: skip
LINK = re.compile(r"\]\(([^()\s]+)\)")


def guides() -> list[Path]:
    """Every Markdown file under version control."""
    command = ["git", "ls-files", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    if not listed:
        pytest.skip("not a git checkout")
    return [path for path in (ROOT / name for name in listed) if path.is_file()]


def prose(text: str) -> str:
    """``text`` without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def section(name: str) -> str:
    return TEXT.split(f"\n## {name}\n")[1].split("\n## ")[0]


def anchors(path: Path) -> set[str]:
    """The headings of a file as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= 160
    assert len(TEXT.split()) <= 1300


def test_its_sections_stand_in_order() -> None:
    assert re.findall(r"^## (.+)$", prose(TEXT), flags=re.MULTILINE) == SECTIONS
    head = TEXT.split("\n## ")[0]
    assert head.startswith("# peft-sapt\n") and "](examples/results/attention.png)" in head


def test_its_bash_blocks_are_the_two_commands() -> None:
    """CI runs the first and the second."""
    assert TEXT.count("```bash") == 2
    [quickstart], [tests] = (block.splitlines() for block in blocks("bash"))
    assert quickstart.endswith("examples/quickstart.py") and tests.endswith("-m pytest")


def test_its_python_is_short() -> None:
    learn, answer = ([line for line in block.splitlines() if line] for block in blocks("python"))
    assert len(learn) <= 30 and len(answer) <= 5


def test_its_results_say_where_they_come_from() -> None:
    """One table of at most six rows, the command that makes it and the folder of its raw files."""
    found = section("Results")
    assert len(re.findall("<!-- table ", TEXT)) == 1
    assert len(re.findall(r"^\|", found, flags=re.MULTILINE)) <= 2 + 6
    assert "peft-sapt bench --config" in found and "](examples/results/long_sequence)" in found


def test_links_lead_to_files_and_headings() -> None:
    lost = []
    for guide in guides():
        for target in LINK.findall(prose(guide.read_text(encoding="utf-8"))):
            name, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            path = guide.parent / name if name else guide
            if not path.exists() or (anchor and anchor not in anchors(path)):
                lost.append(f"{guide.relative_to(ROOT)}: {target}")
    assert not lost


def test_nothing_claims_to_be_on_pypi() -> None:
    """Neither a guide nor the model card, whose text stands in the package."""
    claim = re.compile(r"pip install [\"']?peft[-_]sapt\b|pypi\.org/project/peft[-_]sapt")
    files = [*guides(), *(ROOT / "peft_sapt").rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if claim.search(path.read_text(encoding="utf-8"))] == []


def test_the_guides_give_one_learning_rate_for_the_attention() -> None:
    texts = [path.read_text(encoding="utf-8") for path in guides()]
    assert {rate for text in texts for rate in re.findall(r"attention_lr=([\d.e-]+)", text)} == {"3e-4"}
