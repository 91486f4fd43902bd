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
