"""Exceptions of peft_sapt: each message names what was wrong, where, and what to do about it."""


class SaptError(ValueError):
    """Base class of every error that peft_sapt raises for bad input."""


class TaskError(SaptError):
    """A task name is malformed, unknown, already taken, or not the one that may be trained now."""


class PromptError(SaptError):
    """The prompt tokens of a row, from which its attention query is computed, cannot be determined."""


class WeightsError(SaptError):
    """Attention weights given by the caller, or kept with a cache, do not fit the pool or the batch."""


class PoolFormatError(SaptError):
    """A saved pool contradicts itself, its config, or the base model it is loaded onto."""


class OtherBaseError(PoolFormatError):
    """A pool is loaded onto a base model with other weights than the one it was made for."""


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


class ReleaseError(SaptError):
    """Folders of the official release are incomplete, contradict each other, or ask for code to be run."""
