"""A pool's own config beside the one that its user gave.

A pool grows by changing its config, so that must not be the user's object, which may serve other models too. PEFT's
``peft_config`` shows the user's object all the same, until the pool first changes; then it shows the pool's own.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import OtherShapeError, SaptError
from ..routing.hidden import can_read, check_layer, hidden_size
from ..routing.memory import TaskMemory
from ..routing.prompts import checked_token_dim
from .refusals import POOL_IN_POOL

FOUND = "_sapt_token_dim_found"  # on a config: token_dim is the last base model's, which another need not have


def check_place(model: nn.Module, adapter_name: str) -> None:
    """Raises [`SaptError`] for a name that PEFT would misread, or a ``model`` that has a pool where one would go."""
    if adapter_name.isdigit():
        raise SaptError(f"Adapter name {adapter_name!r} is all digits, which PEFT confuses with layer indices.")
    for memory in model.modules():
        if isinstance(memory, TaskMemory) and (memory.hooks.base is not model or memory.holds(adapter_name)):
            raise SaptError(POOL_IN_POOL)


def prepare_given(given: SaptConfig, embedding: Tensor | None, model: nn.Module) -> SaptConfig:
    """A pool's own copy of the config that its user gave; both learn the width of the base's token embeddings.

    Raises:
        OtherShapeError: the config was given another width.
    """
    follow_changes(given)
    if getattr(given, FOUND, None) == given.token_dim:
        given.token_dim = None
    if given.token_dim is None:
        given.token_dim = checked_token_dim(None, embedding)
        setattr(given, FOUND, given.token_dim)
    else:
        checked_token_dim(given.token_dim, embedding)
    config = copy.deepcopy(given)
    vars(config).pop(FOUND, None)
    choose_features(config, embedding, model)
    if config.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
        # PEFT adds the head to the user's object, after this: one list for both
        given.modules_to_save = config.modules_to_save = given.modules_to_save or []
    return config


def choose_features(config: SaptConfig, embedding: Tensor | None, model: nn.Module) -> None:
    """Fill in what tells prompts apart on ``model``, and its width.

    Raises:
        SaptError: there are no such layers. OtherShapeError: the pool was made for another width.
    """
    if config.pool_padding and config.features is None:
        config.features = "max"
    if config.features is None:
        config.features = "hidden" if can_read(model, embedding) else "both"
        if embedding is None:
            config.features = "mean"  # which a caller pools, of the width that the config gives
    width = config.token_dim or 0
    if config.features == "hidden":
        config.features_layer = check_layer(model, config.features_layer)
        width = hidden_size(model) or width
    elif config.features_layer is not None:
        raise SaptError(f"SaptConfig.features_layer is for features='hidden', not {config.features!r}. Leave it out.")
    width = 2 * width if config.features == "both" else width
    if config.feature_dim not in (None, width):
        raise OtherShapeError(
            f"The pool tells prompts apart by vectors of width {config.feature_dim}, and with features="
            f"{config.features!r} this base model gives {width}: it was made for another one. Load it onto that one."
        )
    config.feature_dim = width


def follow_changes(given: SaptConfig) -> None:
    """Let ranks, alphas and the only task of a config that no pool has grown follow what was set after it was made."""
    rank, alpha, name = given.derived_from
    if given.r != rank and given.task_ranks == [rank] * len(given.tasks):
        given.task_ranks = [given.r] * len(given.tasks)
    if given.lora_alpha != alpha and given.task_alphas == [alpha] * len(given.tasks):
        given.task_alphas = [given.lora_alpha] * len(given.tasks)
    if given.task_name is not None and given.task_name != name and given.tasks == [name]:
        given.tasks = [given.task_name]
    given.__post_init__()
