"""SaptConfig: what a pool is made of."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES

from .errors import ConfigFileError, SaptError, TaskError
from .ops.dispatch import KERNELS
from .validation import (
    check_task_name,
    checked_background,
    checked_records,
    is_int,
    is_number,
    is_positive,
    is_token_list,
)
from .version import METHOD

OPTIONS = (
    "top_k",
    "min_weight",
    "renormalize",
    "fallback",
    "kernel",
    "old_block_gradient",
    "answer_header",
)  # of a pool, at any time
# what the pool follows when its user's config is changed: these, and what the next task or save takes from it
FOLLOWED = (
    *OPTIONS,
    "inference_mode",
    "r",
    "lora_alpha",
    "init_weights",
    "temperature",
    "ridge",
    "revision",
    "base_model_name_or_path",
)
FEATURES = ("max", "mean", "both", "hidden")
FILLED_IN: Any = None  # default of fields that have a value for each task, once the config is made


@dataclass
class SaptConfig(PeftConfig):
    """Configuration of a [`SaptModel`]: one adapter that holds a pool of LoRA blocks and the attention over them.

    Method: *SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning of LLMs* (ACL 2024,
    arXiv 2401.08295). Defaults are the paper's where its official code names a value (``r=4``, ``lora_alpha=32``,
    ``lora_dropout=0``, ``query_dim=100``), otherwise those of PEFT's LoRA.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from peft_sapt import SaptConfig

    >>> model = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", task_name="agnews"))
    >>> model.add_task("dbpedia")
    >>> model.tasks
    ['agnews', 'dbpedia']
    ```

    Raises:
        SaptError: a field has a value outside its range; the message names the field.
        TaskError: a task name is malformed or given twice.
    """

    task_name: str | None = field(
        default=None, metadata={"help": "Name of the task to train first (of the newest one, in a pool of several)."}
    )
    r: int = field(default=4, metadata={"help": "Rank of each block; `add_task(..., r=...)` overrides it."})
    lora_alpha: float = field(default=32, metadata={"help": "Each block is scaled by lora_alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of the block that trains; frozen blocks see no dropout."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, or one regex, of the modules to adapt; by default PEFT's mapping for LoRA."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regex, of modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; all of them by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, if layers_to_transform needs it."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules outside the pool to train and save in full."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: a new block is the identity (B = 0). False: random, non-zero blocks, for tests."},
    )
    block: str = field(
        default="lora",
        metadata={
            "help": "'lora': low-rank updates of target_modules. 'prompt': soft prompts of equal length, mixed and "
            "put before the input (SAPT-Prompt), for language models; a fresh one is not the identity."
        },
    )
    num_virtual_tokens: int = field(default=20, metadata={"help": "block='prompt': length of each soft prompt."})
    router: str = field(
        default="attention",
        metadata={
            "help": "'attention': query and keys, learned with the task and held by ARM's replay. 'ridge': ridge "
            "regression of the task on the prompts' features in closed form; keeps sums only, needs no replay."
        },
    )
    ridge: float = field(
        default=0.03, metadata={"help": "router='ridge': regulariser, as a share of the features' mean variance."}
    )
    fallback: str | float | None = field(
        default="auto",
        metadata={
            "help": "Which prompts the base model answers by itself. 'auto': those that no task claims, by limits "
            "that its own prompts and everyday ones have set (ArmCallback shows both to the pool). A number: those "
            "whose best score (about 1 for a task's own prompts, 0 for others) is below it. None: no prompt."
        },
    )
    statistics_rank: int = field(
        default=32,
        metadata={
            "help": "Directions kept of the covariance of each task's prompts, for replay='statistics' and "
            "fallback='auto'; 0 keeps no statistics at all."
        },
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "What tells prompts apart: 'hidden' (mean hidden state above features_layer layers of the frozen "
            "base: other wordings find their block), 'both' (mean and max of token embeddings), 'mean', or 'max' (the "
            "paper's). By default 'hidden', or 'both' where the base model does not tell its layers."
        },
    )
    features_layer: int | None = field(
        default=None,
        metadata={"help": "features='hidden': layers that run for each prompt; three tenths of them by default."},
    )
    feature_dim: int | None = field(
        default=None, metadata={"help": "Width of the vector that tells a prompt; found from the base model."}
    )
    query_dim: int = field(default=100, metadata={"help": "Width of the bottleneck of the query projection."})
    query_activation: str = field(
        default="after",
        metadata={
            "help": "'after': LayerNorm(SiLU(W_up W_down e)), as in the official code; 'between': LayerNorm(W_up "
            "SiLU(W_down e)), as in the paper's Eq. 1."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Scores are divided by temperature * sqrt(feature_dim) before the softmax."}
    )
    old_block_gradient: bool = field(
        default=True,
        metadata={
            "help": "Let the gradient flow through frozen blocks to lower layers. False cuts it, as the official code "
            "does."
        },
    )
    answer_header: list[int] | None = field(
        default=None,
        metadata={
            "help": "Token ids that begin each answer of a chat (a template's assistant header): the query ends with "
            "the first one, in training and inference. Needed for training on chats of several turns."
        },
    )
    pool_padding: bool = field(
        default=False,
        metadata={
            "help": "Let padding enter the max over tokens, as in the official code: a row's weights then depend on "
            "its batch mates."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "In inference keep only the top_k largest weights of a row; all by default."},
    )
    min_weight: float = field(
        default=0.0,
        metadata={
            "help": "In inference drop weights below this one; the largest of a row stays. In each layer the output "
            "moves by at most sum of dropped w_t * s_t * ||B_t A_t|| * ||x||. Generation then costs what the blocks "
            "that are left cost."
        },
    )
    renormalize: bool = field(
        default=False,
        metadata={
            "help": "Scale the weights that top_k and min_weight keep, so that they sum to what they all did; with "
            "top_k=1 the leading block answers at full strength."
        },
    )
    kernel: str = field(
        default="auto",
        metadata={
            "help": "Implementation of the weighted sum: 'auto' (Triton on CUDA, else torch), 'reference', 'torch' or "
            "'triton'. The environment variable PEFT_SAPT_KERNEL overrides it."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale blocks by lora_alpha / sqrt(r) instead."})
    token_dim: int | None = field(
        default=None, metadata={"help": "Width of the token embeddings; read from the base model if not given."}
    )
    tasks: list[str] = field(
        default=FILLED_IN,
        metadata={"help": "Names of all tasks of the pool, oldest first; the last one is trainable."},
    )
    task_ranks: list[int] = field(default=FILLED_IN, metadata={"help": "Rank of each task's block."})
    task_alphas: list[float] = field(default=FILLED_IN, metadata={"help": "lora_alpha of each task's block."})
    replay_rows: list[int] = field(
        default=FILLED_IN, metadata={"help": "Number of replay rows kept in the pool for each task."}
    )
    background_rows: list[int] = field(
        default=FILLED_IN,
        metadata={"help": "Number of prompts of no task that the pool keeps features of, by the form they come in."},
    )
    background_forms: list[list[list[int]]] = field(
        default=FILLED_IN, metadata={"help": "Token ids before and after these prompts, for each such form."}
    )
    records: dict[str, dict[str, Any]] = field(
        default=FILLED_IN, metadata={"help": "What the model card says of each task; see `record_task`."}
    )
    save_id: str | None = field(
        default=None, metadata={"help": "Which save this belongs to; the weights file of that save has the same."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT keeps names in sets
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]  # PEFT keeps names in sets
        if self.layers_pattern and self.layers_to_transform is None:
            raise SaptError("layers_pattern is given without layers_to_transform: give both, or neither.")
        self.check_ranges()
        self._check_tasks()
        self._check_auto_mapping()
        if self.answer_header is not None and self.task_type == "SEQ_2_SEQ_LM":
            raise SaptError(
                "SaptConfig.answer_header is for decoders: an encoder's input holds no answer. Leave it out."
            )
        if self.block == "prompt":
            self._check_prompt()

    def check_ranges(self) -> None:
        """Raises [`SaptError`] for a field outside its range."""
        from .routing import ROUTERS  # whose classes take this one

        checks: list[tuple[str, bool, str]] = [
            ("r", is_int(self.r) and self.r > 0, "a positive int"),
            ("lora_alpha", is_positive(self.lora_alpha), "a positive number"),
            ("lora_dropout", is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "a number in [0, 1)"),
            ("block", self.block in ("lora", "prompt"), "'lora' or 'prompt'"),
            ("num_virtual_tokens", is_int(self.num_virtual_tokens) and self.num_virtual_tokens > 0, "a positive int"),
            ("router", isinstance(self.router, str) and self.router in ROUTERS, " or ".join(map(repr, ROUTERS))),
            ("ridge", is_positive(self.ridge), "a positive number"),
            ("fallback", self.fallback in (None, "auto") or is_number(self.fallback), "'auto', a number or None"),
            ("statistics_rank", is_int(self.statistics_rank) and self.statistics_rank >= 0, "an int, 0 or more"),
            ("features", self.features in (None, *FEATURES), " or ".join(map(repr, FEATURES)) + " or None"),
            ("feature_dim", self.feature_dim is None or (is_int(self.feature_dim) and self.feature_dim > 0), "an int"),
            ("features_layer", self.features_layer is None or is_int(self.features_layer), "an int or None"),
            ("query_dim", is_int(self.query_dim) and self.query_dim > 0, "a positive int"),
            ("query_activation", self.query_activation in ("after", "between"), "'after' or 'between'"),
            ("answer_header", is_token_list(self.answer_header), "a non-empty list of token ids or None"),
            ("top_k", self.top_k is None or (is_int(self.top_k) and self.top_k > 0), "a positive int or None"),
            ("min_weight", is_number(self.min_weight) and 0 <= self.min_weight < 1, "a number in [0, 1)"),
            ("renormalize", isinstance(self.renormalize, bool), "True or False"),
            ("kernel", self.kernel in KERNELS, f"one of {list(KERNELS)}"),
            ("temperature", is_positive(self.temperature), "a positive number"),
        ]
        for name, valid, wanted in checks:
            if not valid:
                raise SaptError(f"SaptConfig.{name} must be {wanted}, got {getattr(self, name)!r}.")
        ROUTERS[self.router].check_config(self)

    def _check_auto_mapping(self) -> None:
        """PEFT imports the module that is named there, so a file may name transformers' or one that is imported."""
        if self.auto_mapping is None:
            return
        named = self.auto_mapping.get("parent_library") if isinstance(self.auto_mapping, dict) else None
        if not isinstance(named, str) or (named.split(".")[0] != "transformers" and named not in sys.modules):
            raise ConfigFileError(
                f"auto_mapping names the module {named!r}, which loading would import and run. Import it yourself "
                "first if you trust it."
            )

    def _check_tasks(self) -> None:
        if self.tasks is None:
            self.tasks = [self.task_name if self.task_name is not None else "task_1"]
        elif isinstance(self.tasks, str) or not isinstance(self.tasks, Iterable) or not list(self.tasks):
            raise TaskError(f"SaptConfig.tasks must be a non-empty list of names, got {self.tasks!r}.")
        self.tasks = [check_task_name(name) for name in self.tasks]
        if len(set(self.tasks)) != len(self.tasks):
            raise TaskError(f"SaptConfig.tasks holds a name twice: {self.tasks}. Give each task its own name.")
        if self.task_name is not None and self.task_name != self.tasks[-1]:
            raise TaskError(
                f"SaptConfig.task_name is {self.task_name!r}, but the last of tasks, the one that trains, is "
                f"{self.tasks[-1]!r}: leave task_name out, or give the same name."
            )
        self.task_name = self.tasks[-1]
        count = len(self.tasks)
        self.task_ranks = [self.r] * count if self.task_ranks is None else list(self.task_ranks)
        self.task_alphas = [self.lora_alpha] * count if self.task_alphas is None else list(self.task_alphas)
        self.replay_rows = [0] * count if self.replay_rows is None else list(self.replay_rows)
        self.background_rows, self.background_forms = checked_background(self.background_rows, self.background_forms)
        self.records = checked_records(self.records, self.tasks)
        self.saved_with: str | None = None  # no field: which save the weights of its pool were last written for
        self.derived_from = self.r, self.lora_alpha, self.task_name  # no field: what ranks, alphas and tasks came from
        wanted = {
            "task_ranks": ("whole", lambda v: is_int(v) and v >= 1),
            "task_alphas": ("positive", is_positive),
            "replay_rows": ("whole", lambda v: is_int(v) and v >= 0),
        }
        for name, (kind, valid) in wanted.items():
            values = getattr(self, name)
            if len(values) != count or not all(map(valid, values)):
                raise SaptError(
                    f"SaptConfig.{name} must hold one {kind} number for each of the {count} tasks, got {values!r}."
                )

    def _check_prompt(self) -> None:
        """No module is adapted by soft prompts; PEFT has a name for that."""
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "lora_dropout"):
            if getattr(self, name) and getattr(self, name) != DUMMY_TARGET_MODULES:
                raise SaptError(f"SaptConfig.{name} is for block='lora': soft prompts adapt no module. Leave it out.")
        if self.task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
            raise SaptError(
                f"block='prompt' is for decoder-only and encoder-decoder language models, not for {self.task_type}."
            )
        self.target_modules = DUMMY_TARGET_MODULES

    @property
    def scalings(self) -> list[float]:
        """lora_alpha / r (with use_rslora / sqrt(r)) of each task, oldest first."""
        power = 0.5 if self.use_rslora else 1.0
        return [a / r**power for a, r in zip(self.task_alphas, self.task_ranks, strict=True)]

    def set_tasks(self, other: SaptConfig) -> None:
        """Describe the tasks that ``other`` does; records of tasks that are gone go with them."""
        for name in ("tasks", "task_ranks", "task_alphas", "replay_rows", "task_name"):
            setattr(self, name, getattr(other, name))
        self.records = checked_records(self.records, self.tasks)

    # --- files: what is done with them stands in pool/config_file.py ----------------------------------------------

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The values in a config's file; raises [`ConfigFileError`] if it is too large or not a JSON object."""
        from .pool.config_file import read_values

        return read_values(path_json_file)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """As in PEFT; in a folder whose last save was interrupted, the weights file decides, and a warning says so.

        Raises:
            PickleError: the folder has its weights as a pickle alone.
            ConfigFileError: adapter_config.json is too large, not JSON, or does not describe a pool.
            PoolFormatError: the weights file is damaged.
        """
        from .pool.config_file import load_config

        return load_config(cls, super().from_pretrained, pretrained_model_name_or_path, subfolder, kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` by a temporary file and a rename, then finish what PEFT wrote around it.

        Raises:
            SaveError: the folder is a file, or the weights were just written as a pickle.
        """
        from .pool.config_file import save_config

        save_config(self, save_directory, kwargs.pop("auto_mapping_dict", None))
