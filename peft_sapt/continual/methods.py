"""All methods of the benchmark by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .baselines.epi import EPI
from .baselines.l2p import L2P
from .baselines.lfpt5 import LFPT5
from .baselines.o_lora import OLora
from .baselines.prog_prompt import ProgPrompt, ProgPromptKnown
from .baselines.replay import Replay
from .bounds import MultiTask, NoLearning, PerTask, Sequential
from .learner import Bench
from .method import Method
from .sapt import RECIPES, PromptPerTask, PromptSequential, SaptMethod

METHODS: dict[str, Callable[[Bench], Method]] = {
    "base": NoLearning,
    "sequential": Sequential,
    "per-task": PerTask,
    "multi-task": MultiTask,
    "replay": Replay,
    "o-lora": OLora,
    "epi": EPI,
    "l2p": L2P,
    "lfpt5": LFPT5,
    "prog-prompt": ProgPrompt,
    "prog-prompt-known": ProgPromptKnown,
    "prompt-sequential": PromptSequential,
    "prompt-per-task": PromptPerTask,
    **{name: partial(SaptMethod, recipe=recipe) for name, recipe in RECIPES.items()},
}
LABELS = {
    "base": "base model",
    "sequential": "sequential LoRA",
    "per-task": "one LoRA per task, known",
    "multi-task": "multi-task LoRA",
    "replay": "Replay",
    "o-lora": "O-LoRA",
    "epi": "EPI",
    "l2p": "L2P",
    "lfpt5": "LFPT5",
    "prog-prompt": "ProgPrompt",
    "prog-prompt-known": "ProgPrompt, task known",
    "sapt": "SAPT",
    "sapt-ridge": 'SAPT, `router="ridge"`',
    "sapt-paper": "SAPT, the paper's query and replay",
    "sapt-ridge-mean": 'SAPT, `router="ridge"`, mean embeddings',
    "sapt-real-rows": "SAPT, real rows replayed",
    "sapt-no-arm": "SAPT without ARM",
    "sapt-no-floor": "SAPT without the floor term",
    "sapt-official": "SAPT with the official ARM",
    "prompt-sequential": "sequential prompt tuning",
    "prompt-per-task": "one prompt per task, known",
    "sapt-prompt": 'SAPT-Prompt, `router="ridge"`',
    "sapt-prompt-learned": "SAPT-Prompt",
}
PROMPTS = {"l2p", "lfpt5", *(name for name in LABELS if "prompt" in name)}


def alone_of(method: str) -> str:
    """The method whose single-task scores FWT of ``method`` is measured against."""
    return "prompt-per-task" if method in PROMPTS else "per-task"
