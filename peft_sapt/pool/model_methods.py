"""The one place where methods of a user's PeftModel are replaced, on the instance; no class is ever changed.

PEFT and transformers leave no other way at three points:

- ``push_to_hub`` writes the Hub's card (or an empty template) over the saved README.md just before the upload, and the
  Trainer writes its own summary at the end of a run. Neither calls anything of the tuner in between, so a PeftModel
  with a pool gets ``create_or_update_model_card`` and ``_upload_modified_files`` of its own, which write our section
  anew. This happens when the PeftModel is built ([`keep_cards_of`]), not in passing when it is saved.
- ``load_adapter`` drops options of a pool (``fallback=0.5``), so it is given one that applies or refuses them. The
  Trainer loads checkpoints by it, and it reads nothing but weights for a known adapter, so that no check of ours would
  learn the folder. ``ArmCallback`` gives its Trainer's model one that looks first.
- ``generate`` of a PeftModel without a task type calls the base model's own, which knows none of our arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..compat import UNASKED, installed
from ..config import SaptConfig
from ..errors import SaptError, VersionError
from ..hub.card import refresh_card
from ..routing.install import memory_on
from ..storage.checkpoints import refuse_incomplete
from .config_file import manifest_in, with_options

REPLACED = ("create_or_update_model_card", "_upload_modified_files", "load_adapter", "generate")
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
        model.load_adapter = partial(load_with_options, model)  # type: ignore[method-assign]  # the point of this file
        if type(model).generate is PeftModel.generate:
            model.generate = partial(generate_by_tuner, model)  # type: ignore[method-assign]  # the point of this file


def update_and_refresh(model: PeftModel, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    with suppress(SaptError, ValueError, KeyError):  # a damaged pool is there, which is about to be overwritten
        refresh_card(output_dir)


def refresh_and_upload(model: PeftModel, working_dir: Any, repo_id: str, *rest: Any, **more: Any) -> Any:
    refresh_card(working_dir, repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *rest, **more)


# --- generation without a task type ----------------------------------------------------------------------------------


def generate_by_tuner(model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a PeftModel that has no task type, by way of the tuner, as those do that have one."""
    return model.base_model.generate(*args, **kwargs)  # type: ignore[operator]  # the tuner has it


# --- what a Trainer loads --------------------------------------------------------------------------------------------


def check_loads(model: Any) -> None:
    """Let ``model``, if it is a [`PeftModel`], check the folders that adapters are loaded from."""
    if isinstance(model, PeftModel):
        model.load_adapter = partial(check_and_load, model)  # type: ignore[method-assign]  # the point of this file


def check_no_loads(model: Any) -> None:
    """Undo [`check_loads`]: the Trainer that marks its checkpoints has ended."""
    if isinstance(model, PeftModel):
        keep_card(model)


def check_and_load(model: PeftModel, model_id: Any, *rest: Any, **more: Any) -> Any:
    """``load_adapter`` behind the checks; raises [`CheckpointError`], [`PickleError`] or [`PoolFormatError`]."""
    folder = Path(model_id)
    if folder.is_dir():
        manifest_in(folder)
        if (folder / STATE).is_file() or folder.name.startswith("checkpoint-"):
            refuse_incomplete(folder)
            _checked.add(model)
    return load_with_options(model, model_id, *rest, **more)


def load_with_options(model: PeftModel, model_id: Any, adapter_name: str, *rest: Any, **more: Any) -> Any:
    """``load_adapter`` with options of a pool, which PEFT drops; raises [`SaptError`] as [`with_options`] says."""
    options = {name: more.pop(name) for name in [*more] if name in SaptConfig.__annotations__}
    known = adapter_name in model.peft_config
    with was_asked_to_check(model, adapter_name):
        result = type(model).load_adapter(model, model_id, adapter_name, *rest, **more)
    config = model.peft_config.get(adapter_name)
    if options and isinstance(config, SaptConfig):
        try:
            if not known and options.get("lora_dropout", config.lora_dropout) != config.lora_dropout:
                raise SaptError(
                    "load_adapter(lora_dropout=...) comes too late, as layers are built from what was saved: give it "
                    "to PeftModel.from_pretrained, or leave it out."
                )
            with_options(config, options, str(model_id))
        except SaptError:
            if not known:
                model.delete_adapter(adapter_name)
            raise
    return result


@contextmanager
def was_asked_to_check(model: PeftModel, adapter: str) -> Iterator[None]:
    """Raises [`VersionError`] if a pool was loaded within and PEFT did not ask the tuner to check it."""
    memory, known = memory_on(model.get_base_model()), adapter in model.peft_config
    before = set() if memory is None else {adapter} & memory.loaded
    if memory is not None:
        memory.loaded -= before
    try:
        yield
    except BaseException:
        if memory is not None:
            memory.loaded |= before
        raise
    memory = memory_on(model.get_base_model())
    if isinstance(model.peft_config.get(adapter), SaptConfig) and (memory is None or adapter not in memory.loaded):
        if not known and len(model.peft_config) > 1:
            model.delete_adapter(adapter)
        raise VersionError(UNASKED.format(what="loaded this pool without asking to check it", versions=installed()))


def was_checked(model: Any) -> bool:
    """Whether ``model`` has loaded a checkpoint that was checked."""
    return model in _checked
