"""Fixtures shared by the suite: seeded tiny models, random pools, batches."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from helpers.tiny import FAMILIES, build_pool

settings.register_profile("tests", deadline=None)  # how long an example takes depends on what else runs
settings.load_profile("tests")
torch.set_num_threads(1)  # tiny models lose more to thread hand-over than they gain


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Name of a model family."""
    return request.param


@pytest.fixture
def pool(family: str):
    """A tiny model with three random non-zero blocks and peaked, row-dependent weights, in eval mode."""
    return build_pool(family, ["a", "b", "c"]).eval()
