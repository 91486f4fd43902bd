"""A pool's own config beside the one that its user gave.

A pool grows by changing its config, so that must not be the user's object, which may serve other models too. PEFT's
``peft_config`` shows the user's object all the same, until the pool first changes; then it shows the pool's own.
"""

from __future__ import annotations

import copy

from torch import Tensor

from ..config import SaptConfig
from ..routing.prompts import checked_token_dim

FOUND = "_token_dim_found"  # on a config: its token_dim is that of the last base model, which another need not have


def prepare_given(given: SaptConfig, embedding: Tensor | None) -> SaptConfig:
    """A pool's own copy of the config that its user gave; both learn the width of the base's token embeddings.

    Raises:
        OtherShapeError: the config was given another width.
    """
    if getattr(given, FOUND, None) == given.token_dim:
        given.token_dim = None
    if given.token_dim is None:
        given.token_dim = checked_token_dim(None, embedding)
        setattr(given, FOUND, given.token_dim)
    else:
        checked_token_dim(given.token_dim, embedding)
    config = copy.deepcopy(given)
    vars(config).pop(FOUND, None)
    if config.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
        # PEFT adds the head to the user's object, after this: one list for both
        given.modules_to_save = config.modules_to_save = given.modules_to_save or []
    return config
