"""What a pool knows of its tasks' prompts without keeping one: of each task the mean of their features, the directions
in which these vary most, and how much varies beside them; and the features of some prompts that belong to no task.

From the first, fresh prompts can be drawn at any time, which hold the attention of old tasks while new ones train.
From both it follows which prompts no task claims, see [`strangers`].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import SaptConfig
from ..pool_module import FreePoolModule, Linears, linear_from, unshard
from . import strangers
from .moments import Moments, along_directions, normal
from .router import feature_dim_of

STATISTICS = "task_statistics"  # attribute on the base model
GIVEN: list[list[int]] = [[-2], []]  # in place of a form's tokens: its prompts were given by a user
FEW_PROMPTS = 100  # a task of so many prompts shares half of its covariance with all tasks
BLUR = 0.3  # standard deviation of the noise on draws, in that of their features
DRAWN, DRAWN_FOR_REMOVED = 1000, 100
UNKNOWN = -1e9  # limit of a task that claims every prompt
UNMEASURED = 1e9  # in place of a limit that no prompt was left out for


def removed_form(task: str) -> list[list[int]]:
    """In place of a form's tokens: its prompts were those of a task of this name."""
    return [[-1], list(task.encode())]


def is_removed(form: list[list[int]]) -> bool:
    return form[0] == [-1]


class TaskStatistics(FreePoolModule):
    """One module on the base model, for the pools of all adapters and routers of every kind.

    Per adapter, all frozen and in float32:
        - ``sapt_statistics`` [k + 2, d] of the newest task, ``sapt_old_statistics`` [(T - 1) (k + 2), d]: mean,
          deviations beside the directions, and the k directions, see [`Moments`].
        - ``sapt_counts`` [T, 3]: the number of prompts that they are of, 0 for a task without; the margin above which
          all but a few of them lay when they were left out; and that of draws in their place, by the same regression.
        - ``sapt_background`` [N, d]: features of prompts that belong to no task, ``SaptConfig.background_rows`` of
          each form.
        - ``sapt_detector`` [T + K, d + 1] and ``sapt_limits`` [T, 1], all the same, which follow from these: see
          [`strangers`].
    """

    other_param_names = (
        "sapt_statistics", "sapt_old_statistics", "sapt_counts", "sapt_background", "sapt_detector", "sapt_limits",
    )  # fmt: skip
    stacks = {"sapt_statistics": "sapt_old_statistics"}
    sapt_statistics: Linears
    sapt_old_statistics: Linears
    sapt_counts: Linears
    sapt_background: Linears
    sapt_detector: Linears
    sapt_limits: Linears

    def __init__(self) -> None:
        super().__init__()
        self.reopened: dict[str, Moments] = {}  # by adapter: what was known of a task before it was opened again

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.reopened.pop(adapter_name, None)

    def update_layer(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Empty statistics for the tasks in ``config``."""
        self.configs[adapter] = config
        count, width, rows = len(config.tasks), feature_dim_of(config), sum(config.background_rows)
        self.sapt_statistics[adapter] = linear_from(torch.zeros(config.statistics_rank + 2, width, device=device))
        if count > 1:
            old = torch.zeros((count - 1) * (config.statistics_rank + 2), width, device=device)
            self.sapt_old_statistics[adapter] = linear_from(old)
        self.sapt_counts[adapter] = linear_from(torch.zeros(count, 3, device=device))
        if rows:
            self.sapt_background[adapter] = linear_from(torch.zeros(rows, width, device=device))
        classes = count + len(config.background_rows)
        self.sapt_detector[adapter] = linear_from(torch.zeros(classes, width + 1, device=device))
        self.sapt_limits[adapter] = linear_from(torch.full((count, 1), UNKNOWN, device=device))

    def part_sizes(self, config: SaptConfig) -> list[int]:
        return [config.statistics_rank + 2] * len(config.tasks)

    def newest_part(self, adapter: str, rank: int) -> dict[str, Tensor]:
        return {"sapt_statistics": torch.zeros_like(self.sapt_statistics[adapter].weight.data)}

    def state_tensors(self, adapter: str) -> list[Tensor]:
        """All that is kept for ``adapter``."""
        containers = (getattr(self, name) for name in self.other_param_names)
        return [container[adapter].weight.data for container in containers if adapter in container]

    # --- what is known ----------------------------------------------------------------------------------------------

    def moments(self, adapter: str) -> list[Moments | None]:
        """Of each task, oldest first; None where nothing is known."""
        config = self.configs[adapter]
        parts = [unshard(self.sapt_statistics[adapter].weight.data).float()]
        if adapter in self.sapt_old_statistics:
            old = unshard(self.sapt_old_statistics[adapter].weight.data).float()
            parts = [*old.split(config.statistics_rank + 2), *parts]
        counts = unshard(self.sapt_counts[adapter].weight.data)[:, 0].tolist()
        return [Moments(p[0], p[1], p[2:], int(n)) if n else None for p, n in zip(parts, counts, strict=True)]

    def background(self, adapter: str) -> list[Tensor]:
        """Features [n, d] of prompts that belong to no task, by rendering."""
        if adapter not in self.sapt_background:
            return []
        rows = unshard(self.sapt_background[adapter].weight.data).float()
        return list(rows.split(self.configs[adapter].background_rows))

    def known(self, adapter: str) -> list[bool]:
        """For each task, oldest first, whether its statistics are here."""
        return [found is not None for found in self.moments(adapter)]

    def draw(self, adapter: str, wanted: list[int], generator: torch.Generator) -> list[Tensor]:
        """Fresh features of each task, ``wanted`` [T] many, from a normal distribution with its statistics.

        A task of few prompts knows its covariance badly: it takes a share ``100 / (100 + n)`` of the noise from the
        tasks at large. All draws are blurred alike, which keeps what is learned from them simple.
        """
        moments, device = self.moments(adapter), self.sapt_counts[adapter].weight.device
        tasks = torch.tensor([t for t, count in enumerate(wanted) for _ in range(count) if moments[t] is not None])
        known = [t for t, own in enumerate(moments) if own is not None]
        width = feature_dim_of(self.configs[adapter])
        if not len(tasks):
            return [torch.zeros(0, width, device=device) for _ in wanted]
        others = torch.tensor(known)[torch.randint(len(known), (len(tasks),), generator=generator)]  # [N]
        counts = torch.tensor([0 if m is None else m.rows for m in moments])
        share = (FEW_PROMPTS / (FEW_PROMPTS + counts[tasks])).unsqueeze(1).to(device)  # [N, 1]
        left = torch.stack([torch.zeros(width, device=device) if m is None else m.left for m in moments]).square()
        means = torch.stack([torch.zeros(width, device=device) if m is None else m.mean for m in moments])
        along = torch.stack([moments[t].directions.square().sum(dim=0) for t in known])  # type: ignore[union-attr]  # they are known
        scale = means[known].square().mean() + left[known].mean() + along.mean()  # of a feature, squared
        tasks, others = tasks.to(device), others.to(device)
        spread = ((1 - share) * left[tasks] + share * left[others] + BLUR**2 * scale).sqrt()  # [N, d]
        drawn = means[tasks] + spread * normal(spread.shape, generator, device)
        shares = ((tasks, (1 - share).sqrt()), (others, share.sqrt()))
        for t in known:  # one product a task, of all draws that take its directions
            rows = [(which == t).nonzero().flatten() for which, _ in shares]
            along = along_directions(moments[t], sum(map(len, rows)), generator)  # type: ignore[arg-type]  # it is known
            parts = along.split([len(index) for index in rows])
            for index, part, (_, factor) in zip(rows, parts, shares, strict=True):
                drawn[index] += factor[index] * part
        return list(drawn.split([int((tasks == t).sum()) for t in range(len(wanted))]))

    def strangers(self, adapter: str, features: Tensor) -> Tensor | None:
        """Which of the prompts [n, d] the base model answers by itself, [n]; None if never any."""
        config = self.configs[adapter]
        if config.fallback is None or (config.fallback == "auto" and not config.background_rows):
            return None
        weights, limits = (unshard(c[adapter].weight.data) for c in (self.sapt_detector, self.sapt_limits))
        if isinstance(config.fallback, str):
            return strangers.are_strangers(features, weights, limits)
        best = strangers.scores(features, weights)[:, : len(limits)].amax(dim=-1)
        unknown = unshard(self.sapt_counts[adapter].weight.data)[:, 0] == 0  # such a task may claim anything
        return (best < config.fallback) & ~unknown.any()

    # --- a task's life ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, adapter: str, features: Tensor, groups: Tensor | None = None) -> None:
        """Take in the newest task's prompts [n, d], in place of what was known of it; of one that was reopened, beside
        what was known before. The others keep their bytes.

        Args:
            groups: which rows are renderings of one prompt, by numbers [n]; by default like rows count once.
        """
        config = self.configs[adapter]
        if not config.statistics_rank or not len(features):
            return
        if groups is None:
            features = features.unique(dim=0)
            groups = torch.arange(len(features), device=features.device)
        others, background = [m for m in self.moments(adapter)[:-1] if m is not None], self.background(adapter)
        own, limit = Moments.of(features, config.statistics_rank), UNMEASURED
        if background:
            left_out = strangers.left_out_margins(features, groups, others, background, config.statistics_rank)
            limit = float(left_out.quantile(strangers.OWN_AWAY)) if len(left_out) else limit
        own = self.reopened[adapter].joined(own) if adapter in self.reopened else own
        self.sapt_statistics[adapter].weight.data.copy_(own.stacked())
        known = [*others, own]
        drawn = (
            strangers.drawn_limits(known, strangers.sums_of(known, background).solve(), DRAWN)[-1]
            if background
            else 0.0
        )
        self.sapt_counts[adapter].weight.data[-1] = torch.tensor([float(own.rows), limit, drawn])
        self.solve(adapter)

    @torch.no_grad()
    def set_background(self, adapter: str, rows: list[Tensor]) -> None:
        """Keep features [n, d] of prompts that belong to no task, by form, in place of what was kept."""
        config = self.hooks.memory.show_own_config(adapter)
        config.background_rows = [len(part) for part in rows]
        self.put_background(adapter, rows)
        self.solve(adapter)

    def put_background(self, adapter: str, rows: list[Tensor]) -> None:
        """Hold ``rows`` [n, d] in place of those before; nothing if there are none."""
        if rows:
            device = self.sapt_counts[adapter].weight.device
            self.sapt_background[adapter] = linear_from(torch.cat(rows).float().to(device))
        elif adapter in self.sapt_background:
            del self.sapt_background[adapter]

    def make_room(self, adapter: str, rows: list[int], forms: list[list[list[int]]]) -> None:
        """Hold as many prompts of no task in each form as a file does, whose tensors come next."""
        config = self.hooks.memory.show_own_config(adapter)
        config.background_rows, config.background_forms = list(rows), list(forms)
        like, width = self.sapt_counts[adapter].weight, feature_dim_of(config)
        self.put_background(adapter, [like.new_zeros(count, width) for count in rows])
        self.sapt_detector[adapter] = linear_from(like.new_zeros(len(like) + len(rows), width + 1))

    def snapshot(self, adapter: str) -> Callable[[], None]:
        """What brings back what is known of prompts of no task, whatever is done to it in between."""
        config, names = self.configs[adapter], ("sapt_background", "sapt_detector")
        known = {name: getattr(self, name)[adapter] for name in names if adapter in getattr(self, name)}
        rows, forms = config.background_rows, config.background_forms

        def undo() -> None:
            config.background_rows, config.background_forms = rows, forms
            for name in names:
                if name in known:
                    getattr(self, name)[adapter] = known[name]
                elif adapter in getattr(self, name):
                    del getattr(self, name)[adapter]

        return undo

    def retired(self, adapter: str, index: int) -> list[Tensor]:
        """Draws [n, d] in place of a task's prompts, for when no task is to claim their like; none if not known."""
        own = self.moments(adapter)[index]
        if own is None:
            return []
        return [own.draws(DRAWN_FOR_REMOVED, torch.Generator().manual_seed(0))]

    def reopen(self, adapter: str) -> None:
        """What is known of the newest task counts beside what is shown next, until it is committed."""
        own = self.moments(adapter)[-1]
        if own is not None:
            self.reopened[adapter] = Moments(own.mean.clone(), own.left.clone(), own.directions.clone(), own.rows)

    def close(self, adapter: str) -> None:
        """The newest task is committed, or another one."""
        self.reopened.pop(adapter, None)

    @torch.no_grad()
    def resize(self, adapter: str, kept: list[int]) -> None:
        """Let counts follow their tasks: ``kept`` are indices of before, -1 for a new task."""
        self.close(adapter)
        old = self.sapt_counts[adapter].weight.data
        self.sapt_counts[adapter] = linear_from(torch.stack([old[i] if i >= 0 else old.new_zeros(3) for i in kept]))
        self.solve(adapter)

    def solve(self, adapter: str) -> None:
        """Find out again, for the tasks that there are now, which prompts none of them claims."""
        moments, background = self.moments(adapter), self.background(adapter)
        counts = self.sapt_counts[adapter].weight.data
        width = feature_dim_of(self.configs[adapter]) + 1
        found = strangers.detector(moments, background, width).to(counts)
        limits, known = torch.full_like(counts[:, :1], UNKNOWN), [m for m in moments if m is not None]
        if background and len(known) == len(moments):
            drawn = strangers.drawn_limits(known, found, DRAWN).to(counts)  # [T]
            moved = (drawn - counts[:, 2]).clamp(max=0)  # by the tasks that came since: related ones share the scores
            own = torch.where(counts[:, 1] == UNMEASURED, drawn, counts[:, 1] + moved)
            limits.fill_(min(float(own.min()), strangers.background_limit(known, background)))
        self.sapt_detector[adapter], self.sapt_limits[adapter] = linear_from(found), linear_from(limits)
