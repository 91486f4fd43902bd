"""Keeps the model card of a pool where PEFT and transformers write README.md anew after a save.

``PeftModel.push_to_hub`` writes the Hub's card (or an empty template) over the saved one just before the upload, and
the Trainer writes its own summary at the end of a run. Neither calls anything of the tuner in between, so a model that
saves a pool gets two methods of its own in place of its class's; no class is changed.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..card import write_card
from ..errors import SaptError
from ..registration import NAME


def refresh_card(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """Write our section of the card in ``folder`` anew, if a pool is saved there."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") == NAME:
        write_card(folder, config, repo_id)


def keep_card(model: Any) -> None:
    """Let ``model``, if it is a [`PeftModel`], write our section after each card of PEFT's or transformers'."""
    if isinstance(model, PeftModel):
        model.create_or_update_model_card = partial(update_and_refresh, model)  # type: ignore[method-assign]
        model._upload_modified_files = partial(refresh_and_upload, model)  # type: ignore[method-assign]


def update_and_refresh(model: PeftModel, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    with suppress(SaptError, ValueError, KeyError):  # a damaged pool is there, which is about to be overwritten
        refresh_card(output_dir)


def refresh_and_upload(model: PeftModel, working_dir: Any, repo_id: str, *rest: Any, **more: Any) -> Any:
    refresh_card(working_dir, repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *rest, **more)
