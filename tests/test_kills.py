"""Real processes are killed while they save, commit, train and evaluate; what is on the disk is then one state."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from killed_worker import fresh_base, go_on_forever, state
from peft import PeftModel
from safetensors.torch import load_file

from peft_sapt import save_pool
from peft_sapt.errors import PoolFormatError

ROOT = Path(__file__).parents[1]
KILLS = 50
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.slow


def learner(folder: Path) -> subprocess.Popen:
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "killed_worker.py"), str(folder)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def forked():
    """Processes that begin with everything imported, so that fifty of them take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_states"])
    return context


def which(model: PeftModel, states: list[PeftModel]) -> int | None:
    """The state that ``model`` is, byte for byte; None if it is a mixture."""
    for number, known in enumerate(states):
        if model.tasks != known.tasks:
            continue
        pairs = ((model.task_state(n), known.task_state(n)) for n in known.tasks)
        if all(torch.equal(one[key], other[key]) for one, other in pairs for key in other):
            return number
    return None


@pytest.mark.parametrize("how", ["ours", "bare"])
def test_fifty_kills_while_loading_committing_and_saving(how: str, tmp_path, forked) -> None:
    rng, found = random.Random(0), Counter()
    states, folder = [state(0), state(1)], tmp_path / "pool"
    states[0].save_pretrained(folder)
    for _ in range(KILLS):
        done, sending = forked.Pipe(duplex=False)
        worker = forked.Process(target=go_on_forever, args=(how, folder, sending))
        worker.start()
        sending.close()  # so that a worker that dies by itself is noticed
        assert done.recv() == 0
        time.sleep(rng.uniform(0, 0.3))
        worker.kill()
        worker.join()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[which(PeftModel.from_pretrained(fresh_base(), folder), states)] += 1
        except PoolFormatError as error:
            found["refused"] += 1
            print(error)
            states[0].save_pretrained(folder)
    print(how, dict(found))
    assert found[None] == 0, f"a mixture of two states was accepted: {found}"
    assert found["refused"] <= (0 if how == "ours" else 1), found
    assert found[0] >= 5 and found[1] >= 5, f"the kills did not fall on different moments: {found}"
    if how == "ours":  # what a killed writer left is taken away by the next one
        save_pool(states[0], folder)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".saving-")]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pool" / WEIGHTS)


def killed_at(folder: Path, phase: str, steps: int, delay: float) -> bool:
    """Kill a learner ``delay`` seconds into the ``steps``-th line of ``phase``; False if it ended before."""
    worker = learner(folder)
    for line in worker.stdout:
        steps -= line.startswith(phase)
        if steps == 0:
            time.sleep(delay)
            break
    ended = worker.poll() is not None
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    return not ended


def test_a_killed_stream_ends_as_one_that_was_left_alone(tmp_path) -> None:
    """Kills in training, in reflection and in evaluation of each task; the pool is then bit-equal."""
    calm = learner(tmp_path / "calm")
    printed, _ = calm.communicate(timeout=600)
    assert calm.returncode == 0 and printed.split()[-1] == "done"
    rng, kills = random.Random(1), Counter()
    for task in "abc":
        plan = (("training", rng.randint(1, 7), 0.05), ("reflecting", 1, 0.4), ("evaluating", 1, 0.02))
        for phase, steps, longest in plan:
            kills[phase] += killed_at(tmp_path / "killed", f"{phase} {task}", steps, rng.uniform(0, longest))
    worker = learner(tmp_path / "killed")
    printed, _ = worker.communicate(timeout=600)
    assert printed.split()[-1] == "done"
    print(dict(kills))
    assert all(kills[phase] >= 2 for phase in ("training", "reflecting", "evaluating")), kills
    one, other = final(tmp_path / "calm"), final(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
