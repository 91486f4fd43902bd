"""The text of a pool's section in its model card, in Markdown."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..fingerprint import short_print
from ..version import __version__

PACKAGES = {"transformers": "Transformers", "torch": "PyTorch"}
LOADERS = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
ROUTERS = {
    "attention": "a learned attention (a query from the prompt, one key per task)",
    "ridge": "ridge regression in closed form (one mean per task)",
}
SOURCES = {
    "pseudo-samples": "prompts that a generator, fitted to the task's own prompts, made up",
    "real rows": "real prompts of its training data",
}
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
class Pool:
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


def section(pool: Pool) -> str:
    """Everything between the marks."""
    parts = [title(pool), summary(pool), "## Tasks", task_table(pool)]
    if pool.picture is not None:
        parts += [
            "## Attention",
            f"![Mean attention of each task's stored prompts over the blocks]({pool.picture})",
            "Rows are the prompts that the pool keeps of each task, columns the blocks that answer them. Computed "
            "from the weights file.",
        ]
    parts += ["## Use", usage(pool), "## Base model", base_notes(pool), "## Data", data_notes(pool)]
    parts += ["### Framework versions", versions(pool), "## Citation", CITATION]
    return "\n\n".join(parts)


def title(pool: Pool) -> str:
    name = pool.repo_id.split("/")[-1] if pool.repo_id else "A SAPT pool"
    return f"# {safe(name)}"


def summary(pool: Pool) -> str:
    count, blocks = len(pool.tasks), "soft prompts" if pool.config.get("block") == "prompt" else "LoRA blocks"
    many = f"{count} {blocks}, one for each task it has learned" if count > 1 else f"one task, in {blocks}"
    on = f", on top of {pool.base}"
    return (
        f"A pool of {many}{on}. For every prompt {ROUTERS.get(pool.config.get('router', ''), 'a router')} decides how "
        "much of each block answers it, so no task has to be named. Made with "
        "[peft-sapt](https://pypi.org/project/peft-sapt/), a method for "
        "[PEFT](https://github.com/huggingface/peft), after "
        "[SAPT](https://arxiv.org/abs/2401.08295) (ACL 2024)."
    )


def task_table(pool: Pool) -> str:
    """One line per task, oldest first; a column nobody has filled is left out."""
    committed = pool.manifest.get("committed") or []
    columns = {
        "task": [code(name) for name in pool.tasks],
        "rank": [str(rank) for rank in pool.config.get("task_ranks") or []],
        "training rows": [number(pool.record(name).get("rows"), 0) for name in pool.tasks],
        "score": [scored(pool.record(name)) for name in pool.tasks],
        "own weight": own_weights(pool),
        "stored rows": [str(rows) for rows in pool.config.get("replay_rows") or []],
        "data": [safe(pool.record(name).get("data", "")) for name in pool.tasks],
        "licence": [safe(pool.record(name).get("license", "")) for name in pool.tasks],
        "state": ["" if done else "open" for done in committed],
    }
    if pool.config.get("block") == "prompt":
        columns["tokens"] = [str(pool.config.get("num_virtual_tokens"))] * len(pool.tasks)
        del columns["rank"]
    shown = {name: cells for name, cells in columns.items() if len(cells) == len(pool.tasks) and any(cells)}
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*shown.values(), strict=True)]
    return "\n".join(lines)


def own_weights(pool: Pool) -> list[str]:
    rows = pool.attention or []
    return ["" if row is None else f"{row[i]:.2f}" for i, row in enumerate(rows)]


def scored(record: dict[str, Any]) -> str:
    metric = safe(record.get("metric", ""))
    return f"{number(record.get('score'), 1)} {metric}".strip()


def usage(pool: Pool) -> str:
    """Three lines that load the pool, and what to do with it."""
    where = pool.repo_id or "path/or/hub-id-of-this-folder"
    loader = LOADERS.get(pool.config.get("task_type") or "")
    if loader is not None and pool.hub_base:
        load = f'from peft import {loader}\nmodel = {loader}.from_pretrained("{where}")'
    else:
        load = f'from peft import PeftModel\nmodel = PeftModel.from_pretrained(base, "{where}")'
        load += "  # base: the model it was made on"
    named = code(f'model.generate(**prompt, sapt_task="{pool.tasks[0]}")')
    return f"""`pip install peft-sapt`; without its import PEFT raises `KeyError: 'SAPT'`.

```python
import peft_sapt
{load}
```

Then `model.generate(**prompt)` answers, `model.attention_weights(**prompt)` tells which blocks did, and
{named} asks one task by name. Prompts are told apart by their
wording: write them as they were written in training. `model.add_task("next")` goes on learning."""


def base_notes(pool: Pool) -> str:
    found = pool.manifest.get("base") or {}
    name = pool.base[0].upper() + pool.base[1:]
    if not found:
        return f"{name}. No fingerprint was taken, so another model of the same shape would not be noticed."
    return (
        f"{name}, fingerprint `{short_print(found)}` ({len(found)} tensors sampled). Loading the pool onto a model "
        "with other weights is refused. The base model's own licence and limits apply."
    )


def data_notes(pool: Pool) -> str:
    """What of the training data is in these files."""
    stored = dict(zip(pool.tasks, pool.config.get("replay_rows") or [], strict=False))
    lines = ["The blocks were fitted to the training data of the tasks above, whose licences bind their use."]
    if pool.config.get("router") == "ridge":
        lines.append("Of the prompts the pool keeps one mean of token embeddings per task and one matrix for all.")
    for kind in sorted({pool.record(name).get("replay", "prompts") for name, rows in stored.items() if rows}):
        names = [n for n, rows in stored.items() if rows and pool.record(n).get("replay", "prompts") == kind]
        what = SOURCES.get(kind, safe(kind))
        listed = ", ".join(f"{code(name)} ({stored[name]})" for name in names)
        lines.append(f"The pool stores pooled embeddings, one vector for each prompt, of {what}: {listed}.")
    if any((pool.folder / "replay").glob("*.jsonl")):
        lines.append(
            "`replay/` holds the text of the made-up prompts. A generator can repeat what it was trained on; copies "
            "of whole training prompts were left out, parts of them may remain."
        )
    if not any(pool.record(name).get("license") for name in pool.tasks):
        lines.append("No licence of the data was recorded (`model.record_task(name, license=...)`).")
    return " ".join(lines)


def versions(pool: Pool) -> str:
    """In the form in which PEFT looks for its own line, so that it adds none elsewhere."""
    lines = [
        f"- PEFT {version('peft')}",
        f"- peft-sapt {__version__}, format {pool.manifest.get('format_version', '-')}",
    ]
    lines += [f"- {title} {version(name)}" for name, title in PACKAGES.items()]
    return "\n".join([*lines, f"- Python {platform.python_version()}"])


def number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def safe(text: Any) -> str:
    """Text of unknown origin as one line that neither ends a table's cell nor opens a tag or a link."""
    flat = " ".join(str(text).split())
    return re.sub(r"([|<>\[\]`*&\\]|(?<!\w)_|_(?!\w))", lambda found: f"&#{ord(found.group())};", flat)


def code(text: Any) -> str:
    """A name as code; not in backticks, inside which nothing can be escaped."""
    return f"<code>{safe(text)}</code>"


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
