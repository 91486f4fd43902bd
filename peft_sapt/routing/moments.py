"""Mean and low-rank covariance of a task's prompts, and draws from the normal distribution that has them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 640  # rows or columns up to which all singular values are computed


class Moments(NamedTuple):
    """``mean`` [d] of a task's features, ``left`` [d], the standard deviations beside the ``directions`` [k, d], each
    as long as the standard deviation along it; and the number of prompts."""

    mean: Tensor
    left: Tensor
    directions: Tensor
    rows: int

    @classmethod
    def of(cls, features: Tensor, rank: int) -> Moments:
        """Of features [n, d], with ``rank`` directions, or as many as n rows have; the others are zero."""
        x = wide(features)
        mean, centred = x.mean(dim=0), x - x.mean(dim=0)
        sizes, axes = leading(centred / math.sqrt(max(1, len(x) - 1)), rank)
        k = min(rank, len(x) - 1, len(axes))
        directions = torch.zeros(rank, x.shape[1], dtype=x.dtype, device=x.device)
        directions[:k] = axes[:k] * sizes[:k, None]
        varies = centred.square().sum(dim=0) / max(1, len(x) - 1)
        left = (varies - directions.square().sum(dim=0)).clamp(min=0).sqrt()
        return cls(mean.float(), left.float(), directions.float(), len(x))

    def joined(self, other: Moments) -> Moments:
        """Of the prompts of both, with as many directions: their covariance is (1 - w) C_1 + w C_2 + w (1 - w) D D^T,
        with w the share of the ``other`` ones and D the difference of the means."""
        share = other.rows / (self.rows + other.rows)
        a, b = (1 - share) ** 0.5, share**0.5
        apart = wide(self.mean - other.mean)[None] * a * b
        rows = torch.cat([wide(self.directions) * a, wide(other.directions) * b, apart])  # [2 k + 1, d]
        sizes, axes = leading(rows, len(self.directions))
        kept = (axes * sizes[:, None])[: len(self.directions)]
        directions = torch.zeros_like(wide(self.directions))
        directions[: len(kept)] = kept
        left = (1 - share) * wide(self.left).square() + share * wide(other.left).square()
        left = left + (rows.square().sum(dim=0) - directions.square().sum(dim=0)).clamp(min=0)
        mean = (1 - share) * self.mean + share * other.mean
        return Moments(mean, left.sqrt().float(), directions.float(), self.rows + other.rows)

    def stacked(self) -> Tensor:
        """As one part of a pool, [k + 2, d]."""
        return torch.cat([self.mean[None], self.left[None], self.directions])

    def draws(self, count: int, generator: torch.Generator) -> Tensor:
        """Fresh features [count, d] from the normal distribution that has these moments."""
        return self.mean + noise_of(self, count, generator)

    def second_moment(self) -> Tensor:
        """``E[x x^T]`` for x with a 1 appended: [d + 1, d + 1] in float64."""
        mean, directions = wide(self.mean), wide(self.directions)
        x = torch.cat([mean, mean.new_ones(1)])
        found = torch.outer(x, x)
        found[:-1, :-1] += directions.mT @ directions + torch.diag(wide(self.left).square())
        return found


def wide(x: Tensor) -> Tensor:
    """``x`` in float64, or in float32 on devices that have no wider numbers."""
    return x.float() if x.device.type == "mps" else x.double()


def leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values of ``rows`` [n, d] and their directions [., d], at least ``count`` if there are."""
    if min(rows.shape) <= EXACT:
        _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
        return sizes, axes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _, sizes, axes = torch.svd_lowrank(rows.cpu(), q=2 * count + 16, niter=6)
    return sizes.to(rows.device), axes.mT.to(rows.device)


def noise_of(moments: Moments, count: int, generator: torch.Generator) -> Tensor:
    """Draws [count, d] around 0 with the covariance of ``moments``."""
    along = along_directions(moments, count, generator)
    return along + moments.left * normal((count, len(moments.left)), generator, along.device)


def along_directions(moments: Moments, count: int, generator: torch.Generator) -> Tensor:
    """Draws [count, d] around 0 that vary in the directions of ``moments`` alone."""
    directions = moments.directions
    return normal((count, len(directions)), generator, directions.device) @ directions


def normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal numbers, drawn on the CPU: the same on every device and in every process."""
    return torch.randn(shape, generator=generator).to(device)
