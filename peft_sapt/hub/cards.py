"""Keeps the model card of a pool where PEFT and transformers write README.md anew after a save.

``PeftModel.push_to_hub`` writes the Hub's card (or an empty template) over the saved one just before the upload, and
the Trainer writes its own summary at the end of a run. Neither calls anything of the tuner in between, so two methods
of ``PeftModel`` are wrapped; for other PEFT methods they do what they did.
"""

from __future__ import annotations

import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from .card import write_card
from .registration import NAME

WRAPPED = "_peft_sapt_wrapped"


def refresh_card(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """Write our section of the card in ``folder`` anew, if a pool is saved there."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") == NAME:
        write_card(folder, config, repo_id)


def keep_cards() -> None:
    """Wrap what writes cards in ``PeftModel``; a second call changes nothing."""
    update, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
    if hasattr(update, WRAPPED):
        return

    @wraps(update)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        update(self, output_dir)
        refresh_card(output_dir)

    @wraps(upload)
    def upload_modified_files(self: Any, working_dir: Any, repo_id: str, *rest: Any, **more: Any) -> Any:
        refresh_card(working_dir, repo_id)
        return upload(self, working_dir, repo_id, *rest, **more)

    setattr(create_or_update_model_card, WRAPPED, True)
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]
    PeftModel._upload_modified_files = upload_modified_files  # type: ignore
