"""The one place where methods of a user's PeftModel are replaced, on the instance; no class is ever changed.

PEFT and transformers leave no other way at two points:

- ``push_to_hub`` writes the Hub's card (or an empty template) over the saved README.md just before the upload, and the
  Trainer writes its own summary at the end of a run. Neither calls anything of the tuner in between, so a PeftModel
  with a pool gets ``create_or_update_model_card`` and ``_upload_modified_files`` of its own, which write our section
  anew. This happens when the PeftModel is built ([`keep_cards_of`]), not in passing when it is saved.
- The Trainer loads checkpoints by ``load_adapter``, which reads nothing but weights for a known adapter, so that no
  check of ours would learn the folder. ``ArmCallback`` gives its Trainer's model a ``load_adapter`` that looks first.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import SaptError
from ..hub.card import refresh_card
from ..storage.checkpoints import refuse_incomplete
from .config_file import manifest_in

REPLACED = ("create_or_update_model_card", "_upload_modified_files", "load_adapter")
STATE = "trainer_state.json"  # which a Trainer's checkpoint has
_watched: set[type[nn.Module]] = set()
_checked: WeakSet[PeftModel] = WeakSet()  # models that have loaded a checkpoint by way of this


# --- the model card --------------------------------------------------------------------------------------------------


def keep_cards_of(tuner: type[nn.Module]) -> None:
    """From now on call [`keep_card`] on each PeftModel that is built around a ``tuner``; a second call adds nothing.

    PEFT tells a tuner nothing of its PeftModel, but torch tells of every module that another one is given.
    """

    def look(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if name == "base_model" and isinstance(child, tuner):
            keep_card(parent)

    if tuner not in _watched:
        register_module_module_registration_hook(look)
        _watched.add(tuner)


def keep_card(model: Any) -> None:
    """Let ``model``, if it is a [`PeftModel`], write our section after each card of PEFT's or transformers'."""
    if isinstance(model, PeftModel):
        model.create_or_update_model_card = partial(update_and_refresh, model)  # type: ignore[method-assign]  # the point of this file
        model._upload_modified_files = partial(refresh_and_upload, model)  # type: ignore[method-assign]  # the point of this file


def update_and_refresh(model: PeftModel, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    with suppress(SaptError, ValueError, KeyError):  # a damaged pool is there, which is about to be overwritten
        refresh_card(output_dir)


def refresh_and_upload(model: PeftModel, working_dir: Any, repo_id: str, *rest: Any, **more: Any) -> Any:
    refresh_card(working_dir, repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *rest, **more)


# --- what a Trainer loads --------------------------------------------------------------------------------------------


def check_loads(model: Any) -> None:
    """Let ``model``, if it is a [`PeftModel`], check the folders that adapters are loaded from."""
    if isinstance(model, PeftModel):
        model.load_adapter = partial(check_and_load, model)  # type: ignore[method-assign]  # the point of this file


def check_and_load(model: PeftModel, model_id: Any, *rest: Any, **more: Any) -> Any:
    """``load_adapter`` behind the checks; raises [`CheckpointError`], [`PickleError`] or [`PoolFormatError`]."""
    folder = Path(model_id)
    if folder.is_dir():
        manifest_in(folder)
        if (folder / STATE).is_file() or folder.name.startswith("checkpoint-"):
            refuse_incomplete(folder)
            _checked.add(model)
    return type(model).load_adapter(model, model_id, *rest, **more)


def was_checked(model: Any) -> bool:
    """Whether ``model`` has loaded a checkpoint that was checked."""
    return model in _checked
