"""Which tasks the active pool holds, by name, and what is known of them."""

from __future__ import annotations

from .errors import TaskError
from .reading import PromptReader
from .records import checked_record


class TaskNames(PromptReader):
    """Names and records of the tasks of a [`SaptModel`]'s active adapter."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the active pool, oldest first; a copy."""
        return list(self.pool_config.tasks or [])

    @property
    def current_task(self) -> str:
        """The newest task: the only one that can be trained."""
        return self.tasks[-1]

    @property
    def committed_tasks(self) -> list[str]:
        """Names of the tasks that have been committed."""
        return [n for n, done in zip(self.tasks, self.attention.committed(self.pool_name), strict=True) if done]

    def index_of(self, name: str) -> int:
        """Place of a task in ``tasks``; raises [`TaskError`] if there is none of this name."""
        if name not in self.tasks:
            raise TaskError(f"There is no task {name!r} in the pool. Its tasks are {self.tasks}.")
        return self.tasks.index(name)

    def record_task(
        self,
        name: str,
        *,
        rows: int | None = None,
        score: float | None = None,
        metric: str | None = None,
        data: str | None = None,
        license: str | None = None,
        replay: str | None = None,
    ) -> None:
        """Note what the model card says of a task; what was noted before and is not given now stays.

        Args:
            rows: training rows seen (``ArmCallback`` notes them).
            score: in whatever unit ``metric`` names, such as "exact match, %".
            data: where the rows are from. license: of these rows.
            replay: what stands for the task in replay (``ArmCallback`` notes it).

        Raises:
            TaskError: there is no such task.
            SaptError: a value of the wrong kind. Nothing is changed then.
        """
        self.index_of(name)
        given = {"rows": rows, "score": score, "metric": metric, "data": data, "license": license, "replay": replay}
        records = self.pool_config.records or {}
        self.pool_config.records = {**records, name: {**records.get(name, {}), **checked_record(given)}}
