"""What a pool keeps of its tasks beside blocks and router: attention targets, replay rows, rows seen in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import TrainingError
from ..pool_module import FreePoolModule, Linears, PoolModule, freeze_heads, linear_from, unshard

SEEN_ROWS = 512  # rows whose pooled prompts are remembered for commit_task() without inputs


MEMORY = "task_memory"  # attribute on the base model
LIVE: WeakSet[TaskMemory] = WeakSet()  # those of this process, deep copies too


@dataclass
class Training:
    """What optimizers did since a task was opened: whether anything can have moved its block."""

    start: tuple[int, Any] | None = None  # at its first training forward: steps taken by then, sums of its block
    block_is_held: bool = False  # an optimizer that holds a part of the block has taken a step
    router_is_held: bool = False  # or one that holds parts of the router alone
    block_is_imported: bool = False  # it came from elsewhere, and need not move
    block_is_copied: bool = False  # it started as a copy of another task's
    reopened: Any = None  # sums of its block as it was when a committed task was opened again


class TaskMemory(FreePoolModule):
    """One module on the base model, for the pools of all adapters and routers of every kind.

    Per adapter:
        - ``sapt_targets`` [T, T]: row t is the mean attention over task t's own inputs at its commit (zero for tasks
          that came later); a zero row says that task t is not committed.
        - ``sapt_replay`` [N, d]: pooled embeddings of the replay rows of all tasks, in the order of
          ``SaptConfig.replay_rows``. A router needs nothing else of a prompt, so no text has to be kept.
        - rows seen: pooled prompts of the newest task's training forwards, at most ``SEEN_ROWS``, and those that its
          router was fitted to. They belong to the pool and so to every thread and to copies of the model, but are not
          saved.
    """

    other_param_names = ("sapt_targets", "sapt_replay")
    sapt_targets: Linears
    sapt_replay: Linears

    def __init__(self) -> None:
        super().__init__()
        self.loaded: set[str] = set()  # adapters whose weights come from a file
        self._seen: dict[str, list[Tensor]] = {}
        self._fitted: dict[str, Tensor] = {}
        self.undone: dict[str, tuple[Tensor, Tensor]] = {}  # by adapter: target, replay rows of a task opened again
        self._training: dict[str, Training] = {}
        LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        LIVE.add(self)

    def update_layer(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Build the parts of ``adapter`` for the tasks in ``config``, in float32."""
        self.configs[adapter] = config
        count, rows = len(config.tasks), sum(config.replay_rows)
        # older tasks of a pool built whole count as committed, each to itself until targets are loaded
        committed = torch.arange(count, device=device) < count - 1
        self.sapt_targets[adapter] = linear_from(torch.diag(committed.float()))
        if rows:
            self.sapt_replay[adapter] = linear_from(torch.zeros(rows, config.feature_dim or 0, device=device))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.loaded.discard(adapter_name)
        self.forget(adapter_name)

    def show_own_config(self, adapter: str) -> SaptConfig:
        """The pool's own config, from now on also at ``peft_config``: the pool is about to change it."""
        config = self.hooks.config_of(adapter)
        shown = getattr(self.hooks.base, "peft_config", {})
        if adapter in shown:
            shown[adapter] = config
        return config

    # --- targets --------------------------------------------------------------------------------------------------

    def targets(self, adapter: str) -> Tensor:
        """Mean attention of each task over its own inputs at its commit, [T, T]; a view unless sharded."""
        return unshard(self.sapt_targets[adapter].weight.data)

    def committed(self, adapter: str) -> list[bool]:
        """For each task, oldest first, whether it has been committed."""
        return committed_in(self.targets(adapter))

    def commit(self, adapter: str, target: Tensor, replay: Tensor) -> None:
        """Take in the newest task's attention target [T] and replay rows [n, d]; rows seen are forgotten.

        Raises:
            ValueError: ``target`` is no distribution, by which a commit could not be told from none.
        """
        if not bool(target.isfinite().all()) or not float(target.sum()) > 0:
            raise ValueError(f"An attention target must be finite and above 0 somewhere, got {target.tolist()}.")
        self.set_replay(adapter, [*self.replay(adapter)[:-1], replay.to(self.targets(adapter))])
        self.targets(adapter)[-1] = target.to(self.targets(adapter))
        self.forget(adapter)

    def reopen(self, adapter: str) -> None:
        """Undo the newest task's commit: its target and replay rows go, and are remembered until it is trained."""
        self.undone[adapter] = self.targets(adapter)[-1].clone(), self.replay(adapter)[-1].clone()
        self.targets(adapter)[-1] = 0.0
        self.set_replay(adapter, [*self.replay(adapter)[:-1], self.replay(adapter)[-1][:0]])

    def refuse_untrainable(self, adapter: str) -> None:
        """Raises [`TrainingError`] if nothing on the base model trains, and says why and what to do."""
        if not any(p.requires_grad for p in self.hooks.base.parameters()):
            raise TrainingError(self.why_frozen(adapter))

    def why_frozen(self, adapter: str) -> str:
        """Why nothing of a pool trains, and what to do."""
        config = self.configs[adapter]
        if self.committed(adapter)[-1]:
            return (
                f"Nothing would train: the newest task {config.tasks[-1]!r} is committed. Call add_task(name) for new "
                "data, or reopen_task() to train it further; for an answer, call the model in eval mode or under "
                "torch.no_grad()."
            )
        if config.inference_mode:
            return (
                "Nothing would train: the pool was loaded for inference. Load it with PeftModel.from_pretrained(base, "
                "folder, is_trainable=True); for an answer, call the model in eval mode or under torch.no_grad()."
            )
        return (
            "Nothing would train: no parameter has requires_grad=True. Leave requires_grad as the pool sets it: "
            "model.base_model.set_adapter(name) does so again."
        )

    def head_is_frozen(self, adapter: str) -> bool:
        """Whether the pool's head (modules_to_save) must not train: its task is committed, or several share it."""
        config = self.configs[adapter]
        return bool(config.modules_to_save) and (len(config.tasks) > 1 or self.committed(adapter)[-1])

    def resize(self, adapter: str, kept: list[int]) -> None:
        """Let targets and replay rows follow their tasks: ``kept`` are indices of before, -1 for a new task.

        Attention that went to a task that is gone is shared out among the rest; rows seen stay with the newest one.
        """
        old = self.targets(adapter)
        known = torch.tensor([i >= 0 for i in kept], device=old.device)  # [T]
        index = torch.tensor([max(i, 0) for i in kept], device=old.device)
        targets = old[index][:, index] * known.unsqueeze(0) * known.unsqueeze(1)
        if set(range(len(old))) - set(kept):
            left = targets.sum(dim=1, keepdim=True)  # [T, 1]
            done = (old.sum(dim=1)[index] > 0) & known
            own = torch.eye(len(kept), device=old.device) * done.unsqueeze(1)
            targets = torch.where(left > 1e-6, targets / left, own)
        replay = self.replay(adapter)
        self.undone.pop(adapter, None)
        self.sapt_targets[adapter] = linear_from(targets)
        self.set_replay(adapter, [replay[i] if i >= 0 else replay[0][:0] for i in kept])
        if kept[-1] != len(old) - 1:
            self.forget(adapter)

    # --- replay rows ----------------------------------------------------------------------------------------------

    def replay(self, adapter: str) -> list[Tensor]:
        """Pooled replay embeddings of each task, oldest first, each [n_t, d]; n_t may be 0."""
        config = self.configs[adapter]
        if adapter not in self.sapt_replay:
            empty = self.sapt_targets[adapter].weight.new_zeros(0, config.feature_dim or 0)
            return [empty for _ in config.replay_rows]
        return list(unshard(self.sapt_replay[adapter].weight.data).split(config.replay_rows))

    def set_replay(self, adapter: str, rows: list[Tensor]) -> None:
        """Keep ``rows`` ([n_t, d] of each task) in place of what was kept."""
        kept = torch.cat(rows)
        self.show_own_config(adapter).replay_rows = [len(r) for r in rows]
        if len(kept):
            self.sapt_replay[adapter] = linear_from(kept)
        elif adapter in self.sapt_replay:
            del self.sapt_replay[adapter]

    # --- rows seen in training --------------------------------------------------------------------------------------

    def remember(self, adapter: str, pooled: Tensor) -> None:
        """Note pooled prompts [b, d] of a training forward, up to ``SEEN_ROWS`` in all."""
        seen = self._seen.setdefault(adapter, [])
        count = sum(len(rows) for rows in seen)
        if count < SEEN_ROWS:
            pooled = pooled[~pooled[:, 0].isnan()]  # packed rows may end in padding
            seen.append(pooled[: SEEN_ROWS - count].detach().clone())

    def remember_fitted(self, adapter: str, pooled: Tensor) -> None:
        """Note the first ``SEEN_ROWS`` pooled prompts [N, d] that the router was fitted to."""
        self._fitted[adapter] = pooled[:SEEN_ROWS].detach().clone()

    def seen(self, adapter: str) -> list[Tensor]:
        """Pooled prompts [n, d] that training of the newest task saw; without training, those of ``fit_router``."""
        rows = self._seen.get(adapter)
        if rows:
            return [torch.cat(list(rows))[:SEEN_ROWS]]  # threads that train at once may have noted some more
        return [self._fitted[adapter]] if adapter in self._fitted else []

    def forget(self, adapter: str) -> None:
        """Drop the rows seen: the newest task is another one now, committed, or gone."""
        self._seen.pop(adapter, None)
        self._fitted.pop(adapter, None)
        self.undone.pop(adapter, None)
        self._training.pop(adapter, None)

    def training_of(self, adapter: str) -> Training:
        """What is known of the training of the newest task."""
        return self._training.setdefault(adapter, Training())


def committed_in(targets: Tensor) -> list[bool]:
    """Which tasks are committed, by their attention targets [T, T]: those with a row that is not zero."""
    return (targets.sum(dim=1) > 0).tolist()


def freeze_committed(model: nn.Module) -> None:
    """Freeze the newest part of each pool whose newest task is committed, and open the others, all over ``model``."""
    memory = next((m for m in model.modules() if isinstance(m, TaskMemory)), None)
    if memory is None:
        return
    for adapter, config in memory.configs.items():
        if memory.targets(adapter).device.type == "meta":
            continue  # not loaded yet
        frozen = memory.committed(adapter)[-1]
        for module in model.modules():
            if isinstance(module, PoolModule) and module.holds(adapter):
                module.freeze_newest(adapter, frozen)
        trains = adapter in memory.active_adapters and not config.inference_mode
        freeze_heads(model, adapter, memory.head_is_frozen(adapter), trains)
