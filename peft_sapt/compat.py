"""What differs between versions of torch, transformers, PEFT, Triton and the Hub's client, and which private names of
theirs are used. No other file asks for a version.

[`PRIVATE`] is the list of those names, each with what happens where it is gone: the import is refused with a sentence
that says what would be unprotected, or a slower way is taken.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import huggingface_hub
import peft
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import InvalidVersion, Version
from torch import nn

from .errors import VersionError

REFUSED = "the import is refused"


class Use(NamedTuple):
    """A name of another library, what it is used for, and what happens where it is gone."""

    name: str  # with its module; "()" stands for an object of the class before it, ":" for what a function mentions
    purpose: str
    gone: str = REFUSED


TUNER, LAYER = "peft.tuners.tuners_utils.BaseTuner", "peft.tuners.tuners_utils.BaseTunerLayer"
MODULE, CALLBACK = "torch.nn.Module()", "transformers.trainer_callback.TrainerCallback"
DISPATCHER = "every call of the op goes through torch's dispatcher, some microseconds slower"
RECOMPUTED = "training with activation checkpointing raises WeightsError in its backward pass"
FSDP1 = "a pool that is saved under FSDP1 is refused when it is loaded"
PRIVATE = (
    Use(f"{TUNER}._get_adapter_state_dict", "the manifest goes into what is saved"),
    Use(f"{TUNER}._remap_adapter_state_dict_for_load", "what is loaded is checked against its manifest"),
    Use(f"{TUNER}._remove_adapter_name_from_key", "the manifest names tensors as the file does"),
    Use(f"{TUNER}._cast_adapter_dtype", "frozen blocks are never rounded"),
    Use(f"{TUNER}._create_and_replace", "layers are put in place"),
    Use(f"{TUNER}._replace_module", "heads without a weight can be adapted"),
    Use("peft.PeftModel._enable_peft_forward_hooks", "adapter_names is refused"),
    Use(f"{TUNER}._unload_and_optionally_merge", "unload takes hooks and routers off, and merging is refused"),
    Use(f"{LAYER}._move_adapter_to_device_of_base_layer", "frozen blocks are moved, and never rounded"),
    Use(f"{LAYER}._freeze_non_trainable_peft_weights", "committed tasks stay frozen"),
    Use(f"{LAYER}._get_base_layer_device_and_dtype", "new blocks are made where their layer is"),
    Use(f"{LAYER}._disable_adapters", "disable_adapter gives the base model's answer"),
    Use(f"{LAYER}._active_adapter", "the active pool is known"),
    Use("peft.tuners.tuners_utils._get_in_out_features", "blocks fit their layer, quantised ones too"),
    Use("peft.utils.ModulesToSaveWrapper()._adapters", "heads of a pool are frozen with it"),
    Use("peft.PeftModel._upload_modified_files", "push_to_hub keeps the model card"),
    Use("peft.utils.PeftType._member_map_", "SAPT becomes a PEFT type"),
    Use("peft.utils.PeftType._member_names_", "SAPT becomes a PEFT type"),
    Use("peft.utils.PeftType._value2member_map_", "SAPT becomes a PEFT type"),
    Use(f"{MODULE}._parameters", "the query reads embeddings without hooks"),
    Use(f"{MODULE}._modules", "the query reads embeddings without hooks"),
    Use(f"{MODULE}._forward_hooks", "noise that training adds to embeddings (NEFTune) stays out of the query"),
    Use(f"{MODULE}._forward_pre_hooks", "noise that training adds to embeddings (NEFTune) stays out of the query"),
    Use(f"{MODULE}._backward_hooks", "the query reads embeddings without hooks"),
    Use(f"{MODULE}._backward_pre_hooks", "the query reads embeddings without hooks"),
    Use(f"{MODULE}._apply", "layers that are run once and remembered move with their model"),
    Use(f"{MODULE}._replicate_for_data_parallel()._is_replica", "nn.DataParallel is refused"),
    Use(
        "transformers.PreTrainedModel._set_gradient_checkpointing:_gradient_checkpointing_func",
        "checkpointed segments are recomputed with their own weights",
        RECOMPUTED,
    ),
    Use("torch.distributed.fsdp._unshard_param_utils:_flat_param", "what FSDP1 flattens is none of the base's", FSDP1),
    Use("torch.distributed.fsdp._common_utils:_fsdp_wrapped_module", "FSDP1 wraps heads under another name", FSDP1),
    Use("torch.Tensor._version", "a cache whose rows were changed in place is noticed"),
    Use("sys._getframe", "labels that a caller keeps from the model are noticed"),
    Use("torch._C._get_tracing_state", "calls that nothing traces are short", DISPATCHER),
    Use("torch._C._len_torch_dispatch_stack", "calls that nothing traces are short", DISPATCHER),
    Use("torch._C._functorch.peek_interpreter_stack", "calls that nothing traces are short", DISPATCHER),
    Use("torch._ops._len_torch_dispatch_stack_pre_dispatch", "calls that nothing traces are short", DISPATCHER),
)
PUBLIC = (  # names that some version lacks, on which a promise rests
    Use("peft.utils.register_peft_method", "SAPT becomes a PEFT method"),
    Use(f"{LAYER}.frozen_peft_weight_names", "committed tasks stay frozen"),
    Use("peft.utils.AuxiliaryTrainingWrapper.adapter_state_dict_load_map", "heads are in the manifest"),
    Use("peft.utils.resolve_quantization_backend", "layers that cannot be adapted are refused"),
    Use(f"{CALLBACK}.on_pre_optimizer_step", "ArmCallback stops before NaN reaches the weights"),
    Use(f"{CALLBACK}.on_step_begin", "ArmCallback replays old tasks"),
    Use(f"{CALLBACK}.on_save", "ArmCallback marks complete checkpoints"),
    Use("transformers.generation.continuous_batching.PagedAttentionCache", "continuous batching is refused"),
    Use("torch.optim.optimizer.register_optimizer_step_pre_hook", "an optimizer of replaced parameters is refused"),
    Use("torch.nn.modules.module.register_module_module_registration_hook", "push_to_hub keeps the model card"),
)
# lowest and highest of each that the tests have passed with; SUPPORT.md has the combinations
TESTED = {
    torch: ((2, 6), (2, 15)),
    transformers: ((5, 15), (5, 24)),
    peft: ((0, 21, 2), (0, 21)),
    huggingface_hub: ((1, 31), (2, 4)),
}
UNASKED = "PEFT has {what}, so that nothing protects it. Installed are {versions}: take those that SUPPORT.md names."
FIRST_TRITON = (3, 2)  # the one of torch 2.6: every kernel compiles for sm_80 and sm_90 without spills


# --- what is installed -----------------------------------------------------------------------------------------------


def check_installed() -> None:
    """Refuse versions that lack what a promise rests on, and say so once if they are others than those tested.

    Raises:
        VersionError: a name of [`PRIVATE`] or [`PUBLIC`] is gone for which there is no other way.
    """
    gone = [use for use in (*PRIVATE, *PUBLIC) if use.gone == REFUSED and found(use.name) is None]
    if gone:
        lacks = "; ".join(f"{use.name} ({use.purpose})" for use in gone[:3]) + (" and more" if gone[3:] else "")
        raise VersionError(
            f"The installed {installed()} lack what peft_sapt needs to keep its promises: {lacks}. Install versions "
            f"that it was tested with: {tested()}."
        )
    other = [module.__name__ for module in TESTED if not lowest_to_highest(module)]
    if other:
        warnings.warn(
            f"peft_sapt was not tested with the installed {', '.join(other)}: there is {installed()}, and the tests "
            f"passed with {tested()}. All that it needs of them is there.",
            stacklevel=3,
        )


def found(name: str) -> Any:
    """What ``name`` stands for, as in [`Use`]; None if it is gone."""
    name, _, mentioned = name.partition(":")
    parts = name.replace("()", ".()").split(".")
    try:
        if parts[0] == "sys":
            here: Any = sys
        else:
            here = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], start=2):
            if part == "()":
                here = an_object_of(here)
            elif hasattr(here, part):
                here = getattr(here, part)
            else:
                here = importlib.import_module(".".join(parts[:i]))
        if mentioned and mentioned not in vars(here).values():
            here = here if mentioned in (*here.__code__.co_names, *here.__code__.co_consts) else None
    except Exception:  # whatever keeps it from being found
        return None
    return here


def an_object_of(maker: Any) -> Any:
    """One without contents, to see what such objects have."""
    return maker(nn.Identity(), "default") if maker.__name__ == "ModulesToSaveWrapper" else maker()


def numbers_of(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; () of what is no version."""
    try:
        return Version(version).release
    except InvalidVersion:
        return ()


def lowest_to_highest(module: Any) -> bool:
    """Whether the installed version is not below the lowest tested, and of no newer series than the highest."""
    version, (lowest, highest) = numbers_of(version_of(module)), TESTED[module]
    return lowest <= version and version[:2] <= highest


def version_of(module: Any) -> str:
    return str(getattr(module, "__version__", "of no version"))


def installed() -> str:
    return ", ".join(f"{module.__name__} {version_of(module)}" for module in TESTED)


def tested() -> str:
    def dotted(version: tuple[int, ...]) -> str:
        return ".".join(map(str, version))

    def span(low: tuple[int, ...], high: tuple[int, ...]) -> str:
        return dotted(low) if low[:2] == high else f"{dotted(low)} to {dotted(high)}"

    return ", ".join(f"{module.__name__} {span(*ends)}" for module, ends in TESTED.items())


# --- torch and Triton ------------------------------------------------------------------------------------------------


def _watch() -> Callable[[], Any]:
    """What tells whether a mode, tracer or transform of torch wants to see the calls of ops."""
    names = [use.name for use in PRIVATE if use.gone == DISPATCHER]
    tracing, stack, interpreter, pre_dispatch = (found(name) for name in names)
    if not all((tracing, stack, interpreter, pre_dispatch)):
        return lambda: True
    return lambda: stack() or pre_dispatch() or tracing() or interpreter() is not None


torch_watches = _watch()


def why_not_this_triton() -> str | None:
    """Why the installed Triton cannot compile the kernels, or None if it can."""
    try:
        import triton
    except ImportError as error:  # 3.2 to 3.4 import setuptools, which nothing installs with them on Python 3.11
        return f"the installed Triton cannot be imported ({error})."

    if numbers_of(triton.__version__) >= FIRST_TRITON:
        return None
    needed = ".".join(map(str, FIRST_TRITON))
    return f"Triton {triton.__version__} is older than {needed}, the first that the kernels were compiled with."


# --- transformers ----------------------------------------------------------------------------------------------------

PAST = "past_key_values"
# arguments of a forward, and fields of its output, that hold what a next token continues; the usual ones first
# (transformers 5.24 has renamed past_key_values and cache_params to cache, and takes the old names for a while)
CACHE_NAMES = ("cache", PAST, "cache_params", "state", "states", "mems", "past_buckets_states", "layer_past")


def cache_argument(module: nn.Module) -> str:
    """Under which name the forward of ``module`` takes a cache."""
    takes = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in takes), PAST)


def dequantized() -> dict[str, Any]:
    """Arguments of ``from_pretrained(gguf_file=...)`` by which the weights become plain ones, which can be trained."""
    config = getattr(transformers, "GgufConfig", None)  # without which they always are
    return {} if config is None else {"quantization_config": config(dequantize=True)}


# --- the Hub's client ------------------------------------------------------------------------------------------------

# what its HTTP library (httpx, or httpx2 from hub 2.0 on) raises where no answer comes
UNREACHABLE: tuple[type[Exception], ...] = (
    ConnectionError,
    *(base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx")),
)
