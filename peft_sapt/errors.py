"""Exceptions of peft_sapt: each message names what was wrong, where, and what to do about it."""


class SaptError(ValueError):
    """Base class of every error that peft_sapt raises for bad input."""


class VersionError(SaptError, ImportError):
    """An installed library lacks what a promise of this package rests on."""


class TaskError(SaptError):
    """A task name is malformed, unknown, already taken, or not the one that may be trained now."""


class UnsafeNameError(TaskError):
    """A task name could lead out of a folder, or hide in a listing."""


class TrainingError(SaptError, ArithmeticError):
    """A loss, gradient or weight has become NaN or infinite in training."""


class PromptError(SaptError):
    """The prompt tokens of a row, from which its attention query is computed, cannot be determined."""


class WeightsError(SaptError):
    """Attention weights given by the caller, or kept with a cache, do not fit the pool or the batch."""


class PoolFormatError(SaptError):
    """A saved pool contradicts itself, its config, or the base model it is loaded onto."""


class OtherBaseError(PoolFormatError):
    """A pool is loaded onto a base model with other weights than the one it was made for."""


class OtherShapeError(PoolFormatError):
    """A pool is loaded onto a base model whose token embeddings have another width."""


class FormatVersionError(PoolFormatError):
    """A pool was saved in a format that this version does not read."""


class TruncatedFileError(PoolFormatError):
    """A weights file is not as long as its header says, most often since it was cut short."""


class HeaderError(PoolFormatError):
    """A weights file claims a header longer than any pool has, or has one that is not a header."""


class PickleError(PoolFormatError):
    """A folder has its weights as a pickle, which could run code, instead of as safetensors."""


class ChangedTensorError(PoolFormatError):
    """A tensor of a weights file is not the one that was saved."""


class MissingTensorError(PoolFormatError):
    """A weights file lacks tensors that were saved in it."""


class UnknownTensorError(PoolFormatError):
    """A weights file has tensors that were never saved in it."""


class NonFiniteError(PoolFormatError):
    """A tensor of a pool holds NaN or infinity."""


class ConfigFileError(PoolFormatError):
    """An adapter_config.json is too large, not JSON, or does not describe a pool."""


class SaveError(SaptError):
    """A pool cannot be saved as asked."""


class CheckpointError(SaptError):
    """A Trainer's checkpoint was not written to its end."""


class ReflectionError(SaptError):
    """The attentive reflection module cannot do its work: no replay rows, too few pseudo-samples, ..."""


class LoraFolderError(SaptError):
    """A folder cannot be read or written as a plain LoRA adapter, or its LoRA does not fit the pool."""


class KernelError(SaptError, RuntimeError):
    """An implementation of the op was asked for by name that does not exist or cannot run here."""


class StreamError(SaptError):
    """A stream of tasks, or a grid of runs over it, is not what was asked for."""


class PromptFolderError(SaptError):
    """A folder cannot be read or written as a soft prompt of PEFT's prompt tuning, or it does not fit the pool."""


class OfficialCheckpointError(SaptError):
    """Folders of the official release are incomplete, contradict each other, or ask for code to be run."""
