"""Metrics of continual learning as pure functions of a score matrix.

``R`` is T x T, in percent: row i holds the scores on all tasks after stage i, so R[i][j] is the score on task j after
learning task i. Entries above the diagonal (tasks not learned yet) may be 0 or NaN; a score measured there counts
only as a candidate for the best score in F.Ra, as in the paper's formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray


def score_matrix(R: ArrayLike) -> NDArray[np.float64]:
    """``R`` as a float array, checked.

    Raises:
        ValueError: not square, empty, or a score on or below the diagonal is NaN or infinite.
    """
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"R must be a T x T array with T >= 1, got shape {matrix.shape}.")
    if not np.isfinite(np.tril(matrix)[np.tril_indices(len(matrix))]).all():
        raise ValueError(
            "R has a missing or infinite score on or below the diagonal: evaluate every task learned so far."
        )
    return matrix


def average_performance(R: ArrayLike) -> float:
    """AP: mean score over all tasks after the last stage (SAPT, section 4.1)."""
    return float(score_matrix(R)[-1].mean())


def forgetting_rate(R: ArrayLike) -> float:
    """F.Ra: mean over the first T - 1 tasks of (best score up to stage T - 1) - (final score); 0 for T = 1.

    SAPT, section 4.1. Negative where a task ends above every earlier score of it.
    """
    return forgetting_of(score_matrix(R))


def forgetting_of(matrix: NDArray[np.float64]) -> float:
    """F.Ra over the tasks with a final score alone; the columns [T] of others, which have none, are NaN throughout.

    The stream's last task, which nothing can have made forgotten, does not count. 0 if no task does.
    """
    kept = [j for j in range(len(matrix) - 1) if not np.isnan(matrix[-1, j])]
    return float(np.mean([np.nanmax(matrix[:-1, j]) - matrix[-1, j] for j in kept])) if kept else 0.0


def backward_transfer(R: ArrayLike, divisor: Literal["paper", "textbook"] = "paper") -> float:
    """BWT: sum over tasks of (final score) - (score right after learning it), over T ("paper") or T - 1 ("textbook").

    The paper's published numbers, like its release, divide by T; Lopez-Paz and Ranzato (2017) divide by T - 1.
    0 for T = 1.

    Raises:
        ValueError: ``R`` is not a T x T array with all scores on and below the diagonal, or ``divisor`` is unknown.
    """
    matrix = score_matrix(R)
    if divisor not in ("paper", "textbook"):
        raise ValueError(f"divisor must be 'paper' or 'textbook', got {divisor!r}.")
    count = len(matrix)
    if count == 1:
        return 0.0
    return float((matrix[-1] - matrix.diagonal()).sum() / (count if divisor == "paper" else count - 1))


def forward_transfer(R: ArrayLike, single: Sequence[float] | ArrayLike) -> float:
    """FWT: mean over tasks of (score right after learning it) - (score of a model trained on it alone).

    SAPT, section 4.1, after Lopez-Paz and Ranzato (2017).

    Args:
        single: T measured single-task scores, in percent.

    Raises:
        ValueError: ``R`` is not a T x T array with all scores on and below the diagonal, or ``single`` does not fit.
    """
    matrix = score_matrix(R)
    alone = np.asarray(single, dtype=np.float64)
    if alone.shape != (len(matrix),) or not np.isfinite(alone).all():
        raise ValueError(f"single must hold {len(matrix)} finite scores, got {single!r}.")
    return float((matrix.diagonal() - alone).mean())
