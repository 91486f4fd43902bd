"""The text of a pool's section in its model card, in Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..routing import ROUTERS, Router
from ..storage.fingerprint import short_print
from ..version import __version__
from .markdown import code, number, safe
from .strangers_text import other_prompts

PACKAGES = {"transformers": "Transformers", "torch": "PyTorch"}
LOADERS = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
SOURCES = {
    "pseudo-samples": "prompts that a generator, fitted to the task's own prompts, made up",
    "real rows": "real prompts of its training data",
}
OWN_WEIGHT = (
    "*own weight*: how much of a task's block answers what the pool stores of its prompts, mean. Draws from "
    "statistics scatter more than prompts do, on which it is mostly higher: `model.attention_weights(**prompt)`."
)
CITATION = """```bibtex
@inproceedings{zhao2024sapt,
  title     = {{SAPT}: A Shared Attention Framework for Parameter-Efficient Continual Learning
               of Large Language Models},
  author    = {Zhao, Weixiang and Wang, Shilong and Hu, Yulin and Zhao, Yanyan and Qin, Bing and Zhang, Xuanyu and
               Yang, Qing and Xu, Dongliang and Che, Wanxiang},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics},
  year      = {2024}
}
```"""


@dataclass
class CardData:
    """What a card is written from.

    ``attention`` [T][T] is the mean weight of what is stored of each task, by ``manifest``; ``picture`` the name of
    its image; ``folder`` where the pool lies.
    """

    config: dict[str, Any]
    manifest: dict[str, Any]
    attention: list[list[float] | None] | None
    picture: str | None
    repo_id: str | None
    folder: Path

    @property
    def tasks(self) -> list[str]:
        return self.config["tasks"]

    @property
    def router(self) -> type[Router] | None:
        return ROUTERS.get(self.config.get("router", ""))

    @property
    def hub_base(self) -> str | None:
        """Id of the base model on the Hub; None where it is a folder of somebody's, which helps nobody else."""
        name = self.config.get("base_model_name_or_path")
        return name if is_hub_id(name) else None

    @property
    def base(self) -> str:
        """How the base model is called in a sentence."""
        name = self.config.get("base_model_name_or_path")
        if self.hub_base is not None:
            return code(name)
        return f"the local model {code(Path(name).name)}" if name else "a model that the configuration does not name"

    def record(self, name: str) -> dict[str, Any]:
        return (self.config.get("records") or {}).get(name, {})


def section(data: CardData) -> str:
    """Everything between the marks."""
    parts = [title(data), summary(data), "## Tasks", task_table(data)]
    if data.attention is not None:
        parts.append(OWN_WEIGHT)
    parts += examples(data)
    if data.picture is not None:
        parts += [
            "## Attention",
            f"![Mean attention of each task's stored prompts over the blocks]({data.picture})",
            "Rows are the prompts that the pool keeps of each task, columns the blocks that answer them. Computed "
            "from the weights file.",
        ]
    parts += ["## Use", usage(data), "## Other prompts", other_prompts(data.config, data.manifest)]
    parts += ["## Base model", base_notes(data), "## Data", data_notes(data)]
    parts += ["### Framework versions", versions(data), "## Citation", CITATION]
    return "\n\n".join(parts)


def title(data: CardData) -> str:
    name = data.repo_id.split("/")[-1] if data.repo_id else "A SAPT pool"
    return f"# {safe(name)}"


def summary(data: CardData) -> str:
    count, blocks = len(data.tasks), "soft prompts" if data.config.get("block") == "prompt" else "LoRA blocks"
    many = f"{count} {blocks}, one for each task it has learned" if count > 1 else f"one task, in {blocks}"
    on = f", on top of {data.base}"
    return (
        f"A pool of {many}{on}. For every prompt {data.router.description if data.router else 'a router'} decides how "
        "much of each block answers it, so no task has to be named. Made with peft-sapt, a method for "
        "[PEFT](https://github.com/huggingface/peft), after "
        "[SAPT](https://arxiv.org/abs/2401.08295) (ACL 2024)."
    )


def task_table(data: CardData) -> str:
    """One line per task, oldest first; a column nobody has filled is left out."""
    committed = data.manifest.get("committed", [])
    columns = {
        "task": [code(name) for name in data.tasks],
        "rank": [str(rank) for rank in data.config["task_ranks"]],
        "training rows": [number(data.record(name).get("rows"), 0) for name in data.tasks],
        "score": [scored(data.record(name)) for name in data.tasks],
        "own weight": own_weights(data),
        "stored rows": [str(rows) for rows in data.config["replay_rows"]],
        "data": [safe(data.record(name).get("data", "")) for name in data.tasks],
        "licence": [safe(data.record(name).get("license", "")) for name in data.tasks],
        "state": ["" if done else "open" for done in committed],
    }
    if data.config.get("block") == "prompt":
        columns["tokens"] = [str(data.config.get("num_virtual_tokens"))] * len(data.tasks)
        del columns["rank"]
    shown = {name: cells for name, cells in columns.items() if len(cells) == len(data.tasks) and any(cells)}
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*shown.values(), strict=True)]
    return "\n".join(lines)


def examples(data: CardData) -> list[str]:
    """Prompts that may be shown, as the model gets them."""
    known = [(name, data.record(name)["example"]) for name in data.tasks if data.record(name).get("example")]
    if not known:
        return []
    lines = [f"- {code(name)}: {code(as_json(text))}" for name, text in known]
    return ["## Prompts", "As the model gets them, `\\n` being a line break:", "\n".join(lines)]


def as_json(text: str) -> str:
    """``text`` in quotation marks; blanks that a page would swallow stand as their codes."""
    shown = json.dumps(text, ensure_ascii=False)
    return re.sub(r"(?<= ) |[^\S ]", lambda found: f"\\u{ord(found.group()):04x}", shown)


def own_weights(data: CardData) -> list[str]:
    if data.attention is None:
        return []
    rows = data.attention
    return ["" if row is None else f"{row[i]:.2f}" for i, row in enumerate(rows)]


def scored(record: dict[str, Any]) -> str:
    metric = safe(record.get("metric", ""))
    return f"{number(record.get('score'), 1)} {metric}".strip()


def usage(data: CardData) -> str:
    """Three lines that load the pool, and what to do with it."""
    where = data.repo_id or "path/or/hub-id-of-this-folder"
    loader = LOADERS.get(data.config.get("task_type") or "")
    if loader is not None and data.hub_base:
        load = f'from peft import {loader}\nmodel = {loader}.from_pretrained("{where}")'
    else:
        load = f'from peft import PeftModel\nmodel = PeftModel.from_pretrained(base, "{where}")'
        load += "  # base: the model it was made on"
    named = code(f'model.generate(**prompt, sapt_task="{data.tasks[0]}")')
    return f"""Install peft-sapt from a clone or wheel, `pip install path/to/peft-sapt`. Without its import PEFT raises
`KeyError: 'SAPT'`.

```python
import peft_sapt
{load}
```

Then `model.generate(**prompt)` answers, `model.attention_weights(**prompt)` tells which blocks did, and
{named} asks one task by name. {told_by(data)} `model.add_task("next")` goes on learning."""


def told_by(data: CardData) -> str:
    """How prompts are told apart, and what to mind."""
    how = "as in the examples above" if examples(data) else "as in training, which `record_task(example=)` would show"
    if data.config.get("features") == "hidden":
        return f"Prompts are told apart by what the base model's lower layers make of them, best written {how}."
    return f"Prompts are told apart by their wording: write them {how}."


def base_notes(data: CardData) -> str:
    found = data.manifest.get("base") or {}
    name = data.base[0].upper() + data.base[1:]
    if not found:
        return f"{name}. No fingerprint was taken, so another model of the same shape would not be noticed."
    return (
        f"{name}, fingerprint `{short_print(found)}` ({len(found)} tensors sampled). Loading the pool onto a model "
        "with other weights is refused. The base model's own licence and limits apply."
    )


def data_notes(data: CardData) -> str:
    """What of the training data is in these files."""
    stored = dict(zip(data.tasks, data.config["replay_rows"], strict=False))
    lines = ["The blocks were fitted to the training data of the tasks above, whose licences bind their use."]
    counts = data.manifest.get("statistics", [])
    known = [(name, rows) for name, rows in zip(data.tasks, counts, strict=False) if rows]
    if known:
        listed = ", ".join(f"{code(name)} ({rows})" for name, rows in known)
        lines.append(
            "Of each task's prompts the pool stores the mean of their features and the directions in which they vary, "
            f"and no prompt: {listed}."
        )
    if any(data.record(name).get("prompts") for name in data.tasks):
        lines.append(
            "`adapter_config.json` has short digests of up to a hundred prompts of each task, by which a guess can be "
            "confirmed."
        )
    if data.router and data.router.keeps:
        lines.append(data.router.keeps)
    for kind in sorted({data.record(name).get("replay", "prompts") for name, rows in stored.items() if rows}):
        names = [n for n, rows in stored.items() if rows and data.record(n).get("replay", "prompts") == kind]
        what = SOURCES.get(kind, safe(kind))
        listed = ", ".join(f"{code(name)} ({stored[name]})" for name in names)
        lines.append(f"The pool stores pooled embeddings, one vector for each prompt, of {what}: {listed}.")
    if any((data.folder / "replay").glob("*.jsonl")):
        lines.append(
            "`replay/` holds the text of the made-up prompts. A generator can repeat what it was trained on; copies "
            "of whole training prompts were left out, parts of them may remain."
        )
    if not any(data.record(name).get("license") for name in data.tasks):
        lines.append("No licence of the data was recorded (`model.record_task(name, license=...)`).")
    return " ".join(lines)


def versions(data: CardData) -> str:
    """In the form in which PEFT looks for its own line, so that it adds none elsewhere."""
    lines = [
        f"- PEFT {version('peft')}",
        f"- peft-sapt {__version__}, format {data.manifest.get('format_version', '-')}",
    ]
    lines += [f"- {title} {version(name)}" for name, title in PACKAGES.items()]
    return "\n".join([*lines, f"- Python {platform.python_version()}"])


def is_hub_id(name: object) -> bool:
    """Whether ``name`` could be a model on the Hub; the Hub refuses cards whose base model is a local path."""
    return is_hub_like(name) and not os.path.exists(str(name))


def is_hub_like(name: object) -> bool:
    """Whether ``name`` has the form of an id on the Hub; a relative path of two parts has it too."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
