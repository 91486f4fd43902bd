"""Real processes are killed while they save, commit, train and evaluate; what is on the disk is then one state."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers.campaigns import campaign
from helpers.killed_worker import fresh_base, go_on_forever, state
from helpers.paths import environment
from peft_sapt import save_pool
from peft_sapt.errors import PoolFormatError

WEIGHTS = "adapter_model.safetensors"
HOW = {"save_pool": "ours", "save_pretrained": "bare"}
PHASES = ("training", "reflecting", "evaluating")


def learner(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.killed_worker", str(folder)], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def forked():
    """Processes that begin with everything imported, so that fifty of them take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.killed_states"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # the server takes no other path along
        forkserver.ensure_running()
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


def kill_savers(how: str, kills: int, folder: Path, forked) -> Counter:
    """Kill processes that load, commit and save at random moments; what was found on the disk, by state."""
    rng, found, states = random.Random(0), Counter(), [state(0), state(1)]
    states[0].save_pretrained(folder)
    for _ in range(kills):
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
    print(how, dict(found), flush=True)
    assert found[None] == 0, f"a mixture of two states was accepted: {found}"
    assert found["refused"] <= (0 if how == "ours" else 1), found
    if how == "ours":  # what a killed writer left is taken away by the next one
        save_pool(states[0], folder)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".saving-")]
    return found


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


def kill_learners(folder: Path, plan: list[tuple[str, str]]) -> Counter:
    """Kill a stream in these phases of these tasks, by phase; its pool is then bit-equal to an undisturbed one."""
    calm = learner(folder / "calm")
    printed, _ = calm.communicate(timeout=600)
    assert calm.returncode == 0 and printed.split()[-1] == "done"
    rng, kills = random.Random(1), Counter()
    for phase, task in plan:
        steps = rng.randint(1, 7) if phase == "training" else 1
        longest = {"training": 0.05, "reflecting": 0.4, "evaluating": 0.02}[phase]
        kills[phase] += killed_at(folder / "killed", f"{phase} {task}", steps, rng.uniform(0, longest))
    printed, _ = learner(folder / "killed").communicate(timeout=600)
    assert printed.split()[-1] == "done"
    one, other = final(folder / "calm"), final(folder / "killed")
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    print(dict(kills), flush=True)
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_five_kills_while_loading_committing_and_saving(how: str, tmp_path, forked) -> None:
    assert sum(kill_savers(HOW[how], 5, tmp_path / "pool", forked).values()) == 5


@pytest.mark.slow
def test_a_stream_killed_in_every_phase_ends_as_one_that_was_left_alone(tmp_path) -> None:
    assert sum(kill_learners(tmp_path, list(zip(PHASES, "abc"))).values()) >= 2


@pytest.mark.campaign
def test_a_hundred_kills_of_savers_and_three_of_every_phase(tmp_path, forked) -> None:
    with campaign("kills") as counts:
        for name, how in HOW.items():
            found = kill_savers(how, 50, tmp_path / name, forked)
            assert found[0] >= 5 and found[1] >= 5, f"the kills did not fall on different moments: {found}"
            counts[name] += sum(found.values())
        counts.update(kill_learners(tmp_path, [(phase, task) for task in "abc" for phase in PHASES]))
