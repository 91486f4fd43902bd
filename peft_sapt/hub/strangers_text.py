"""What a reader of a pool is told of prompts that belong to none of its tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .markdown import code


def other_prompts(config: dict[str, Any], manifest: dict[str, Any], as_code: Callable[[Any], str] = code) -> str:
    """What becomes of a prompt that belongs to no task, in a pool with these values; names of tasks ``as_code``."""
    fallback, known, tasks = config.get("fallback"), manifest.get("statistics", []), config["tasks"]
    unknown = [name for name, rows in zip(tasks, known, strict=False) if not rows]
    if fallback is None:
        return "Every prompt is answered by the blocks, also one that belongs to no task (`fallback=None`)."
    if isinstance(fallback, str) and (unknown or not known or not config.get("background_rows")):
        why = "it was never shown prompts of no task"
        if unknown or not known:
            why = f"it has no statistics of {', '.join(map(as_code, unknown or tasks))}"
        return (
            f"This pool knows no strangers, since {why}: a prompt that belongs to no task is answered by some block "
            "all the same. `model.attention_weights(**prompt)` says by which."
        )
    return (
        "A prompt that no task claims is answered by the base model alone, as if there were no pool; "
        "`model.attention_weights(**prompt)` is zero for it. So may be a task's own prompt in words that nobody "
        "trained on: `sapt_task` names its task, and `model.peft_config[name].fallback = None` lets the blocks answer "
        "all."
    )
