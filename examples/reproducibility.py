"""What the paper reports beside what was measured here, method by method; what was not verified, with the reason."""

from __future__ import annotations

from statistics import mean
from typing import Any

from peft_sapt.continual.labels import LABELS, PROMPTS
from peft_sapt.continual.results import metrics_of
from peft_sapt.report.tables import markdown

# AP and F.Ra on 15 tasks with T5-Large: Zhao et al., SAPT, ACL 2024, Table 1
PAPER = {
    "sequential": {"superni": (6.43, 33.39), "long_sequence": (9.72, 78.61)},
    "replay": {"superni": (35.37, 16.92), "long_sequence": (71.28, 13.05)},
    "l2p": {"superni": (12.73, 11.87), "long_sequence": (57.98, 22.49)},
    "lfpt5": {"superni": (34.37, 15.80), "long_sequence": (67.01, 13.89)},
    "prog-prompt": {"superni": (3.34, 35.57), "long_sequence": (7.98, 71.55)},
    "epi": {"long_sequence": (75.15, 1.61)},
    "o-lora": {"superni": (25.89, 26.37), "long_sequence": (69.24, 7.00)},
    "sapt-prompt-learned": {"superni": (41.11, 1.32), "long_sequence": (79.14, 1.68)},
    "sapt": {"superni": (51.54, 0.91), "long_sequence": (82.02, 1.50)},
}
NAMES = {"superni": "SuperNI", "long_sequence": "Long Sequence"}
NOT_RUN = "no: not run, for want of time on two cores"
NOT_RUN_PROMPTS = "no: not run at this size, since soft prompts need the whole depth in each step on two cores"


def reproducibility_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each method and benchmark: the paper's AP / F.Ra, ours, seeds, hardware, commits, verified?"""
    head = ["benchmark", "method", "paper, AP / F.Ra", "ours, AP / F.Ra", "seeds", "hardware", "commit", "verified?"]
    rows = []
    for benchmark, title in NAMES.items():
        for method in [m for m in LABELS if benchmark in PAPER.get(m, {})]:
            paper = "{:.1f} / {:.1f}".format(*PAPER[method][benchmark])
            found = [r for r in runs[benchmark] if r["method"] == method and r["order"] == "listed"]
            if not found:
                why = NOT_RUN_PROMPTS if method in PROMPTS else NOT_RUN
                rows.append([title, LABELS[method], paper, "-", "-", "-", "-", why])
                continue
            measured = [metrics_of(r, runs[benchmark]) for r in found]
            ours = f"{mean(m['AP'] for m in measured):.1f} / {mean(m['F.Ra'] for m in measured):.1f}"
            commits = ", ".join(sorted({str(r["provenance"]["commit"])[:7] for r in found}))
            threads = sorted({f"{r['provenance']['threads']} thread, {r['provenance']['device']}" for r in found})
            counts = [str(len(found)), ", ".join(threads), commits]
            rows.append([title, LABELS[method], paper, ours, *counts, reason(method, measured)])
    return markdown(head, rows)


def reason(method: str, measured: list[dict[str, float]]) -> str:
    """Whether the paper's claim was seen again, which can be said of its direction only."""
    forgets = mean(m["F.Ra"] for m in measured)
    scale = "the number not: 5 of 15 tasks, SmolLM2-135M in place of T5-Large"
    if method == "sapt":
        return f"hardly any forgetting: {'yes' if forgets <= 2 else 'NO'}; {scale}"
    if method == "sequential":
        return f"forgets nearly all: {'yes' if forgets >= 20 else 'NO'}; {scale}"
    return scale
