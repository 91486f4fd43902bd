"""Checks of what a Trainer loads into a pool that is there already: a checkpoint to go on from, or the best one.

The Trainer calls ``PeftModel.load_adapter``, which reads nothing but weights for a known adapter, so that no check of
ours would learn the folder. ``ArmCallback`` gives the Trainer's model a ``load_adapter`` of its own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from peft import PeftModel

from ..config_file import manifest_in
from .checkpoints import refuse_incomplete

STATE = "trainer_state.json"  # which a Trainer's checkpoint has
_checked: WeakSet[PeftModel] = WeakSet()  # models that have loaded a checkpoint by way of this


def watch_loading(model: Any) -> None:
    """Let ``model``, if it is a [`PeftModel`], check the folders that adapters are loaded from."""
    if isinstance(model, PeftModel):
        model.load_adapter = partial(check_and_load, model)  # type: ignore[method-assign]


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
