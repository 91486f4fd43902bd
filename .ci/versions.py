"""Runs the default suite in this environment and notes versions and counts in tests/campaigns/versions.json, and in
the table of SUPPORT.md that is made from it.

    python .ci/versions.py [arguments of pytest]

A row of the same versions is replaced.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_sapt.continual.provenance import installed

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "campaigns" / "versions.json"
GUIDE = ROOT / "peft_sapt" / "SUPPORT.md"
LIBRARIES = ("torch", "transformers", "peft", "huggingface_hub", "datasets", "accelerate", "safetensors", "triton")
SHOWN = ("python", *(name for name in LIBRARIES if name != "safetensors"))
OUTCOMES = ("passed", "failed", "skipped", "xfailed", "error")
Row = dict[str, Any]


def run(arguments: list[str]) -> Row:
    """Counts, reasons of what did not run, and the commit, of one run of the default suite."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "tests"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:  # type: ignore[union-attr]  # a pipe was asked for
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    process.wait()
    counts = {name: 0 for name in OUTCOMES}
    for number, name in re.findall(r"(\d+) (passed|failed|skipped|xfailed|error)", lines[-1] if lines else ""):
        counts[name] = int(number)
    reasons = [line for line in lines if line.startswith(("SKIPPED", "XFAIL", "FAILED", "ERROR"))]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = round(time.perf_counter() - begun)
    return {"counts": counts, "reasons": reasons, "commit": commit.stdout.strip(), "seconds": seconds}


def table(rows: Iterable[Row]) -> str:
    """Markdown; "upstream" counts tests that fail since one of these libraries does, on its own too."""
    lines = [[*SHOWN, "passed", "failed", "skipped", "upstream"], ["---"] * (len(SHOWN) + 4)]
    for row in rows:
        counts = row["counts"]
        found = (counts["passed"], counts["failed"] + counts["error"], counts["skipped"], counts["xfailed"])
        lines.append([*(row["versions"][name] or "-" for name in SHOWN), *map(str, found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(text: str, rows: Iterable[Row]) -> str:
    """The guide with the table between its markers."""
    before, rest = text.split("<!-- table versions -->\n")
    return f"{before}<!-- table versions -->\n{table(rows)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"


if __name__ == "__main__":
    versions = {"python": platform.python_version(), **{name: installed(name) for name in LIBRARIES}}
    row = {"versions": versions, **run(sys.argv[1:])}
    rows = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else []
    rows = [other for other in rows if other["versions"] != row["versions"]] + [row]
    rows.sort(key=lambda one: [one["versions"][name] or "" for name in ("python", "torch", "transformers")])
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(json.dumps(row["counts"]))
