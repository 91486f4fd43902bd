"""Compiles every kernel for sm_80 and sm_90 with this environment's Triton and notes the faults in
tests/campaigns/tritons.json: python .ci/tritons.py [PROCESSES]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import triton

from peft_sapt.continual.provenance import commit
from peft_sapt.ops.devtools.compile_check import compile_all

FILE = Path(__file__).parents[1] / "tests" / "campaigns" / "tritons.json"

if __name__ == "__main__":
    compiled = compile_all(int(sys.argv[1]) if len(sys.argv) > 1 else 2, (80, 90))
    faults = [f"sm_{c.architecture} {c.variant}: {'; '.join(c.faults)}" for c in compiled if c.faults]
    row = {"triton": triton.__version__, "compiled": len(compiled), "faults": faults, "commit": commit()}
    rows = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else []
    rows = [*(other for other in rows if other["triton"] != row["triton"]), row]
    FILE.write_text(json.dumps(sorted(rows, key=lambda r: r["triton"]), indent=1) + "\n", encoding="utf-8")
    print(f"Triton {row['triton']}: {len(compiled)} compiled, {len(faults)} with a fault")
