"""What every router owes: each test runs for all kinds in ``ROUTERS``, one of which was written for these tests."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.steps import digests, step
from helpers.tiny import FAMILIES, assert_real_pool, build_pool, padded, token_rows
from peft_sapt import SaptConfig
from peft_sapt.errors import ChangedTensorError, SaptError, TaskError, TrainingError
from peft_sapt.routing import ROUTERS

ROWS = token_rows([5, 9, 3, 14])
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=list(ROUTERS))
def kind(request: pytest.FixtureRequest) -> str:
    """Value of ``SaptConfig.router``."""
    return request.param


def fresh(family: str, kind: str):
    """A pool of one task that has seen nothing."""
    torch.manual_seed(0)
    task_type, make = FAMILIES[family]
    base = make()
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    return get_peft_model(base, SaptConfig(task_type=task_type, task_name="a", router=kind))


def train(model, seed: int = 0) -> None:
    """Steps on the prompts of one task, known to the router before if it wants to be."""
    if not model.base_model.router.needs_replay:
        model.fit_router([padded(token_rows([4, 5, 6, 7], seed=seed))])
    step(model)


def learned(family: str, kind: str):
    """Three tasks, trained and committed with the rows that training saw."""
    model = fresh(family, kind)
    for seed, name in enumerate("abc"):
        if name != "a":
            model.add_task(name)
        train(model, seed)
        model.commit_task()
    return model


def test_the_life_of_tasks(family: str, kind: str) -> None:
    model, kept = fresh(family, kind), {}
    for seed, name in enumerate("abc"):
        if name != "a":
            model.add_task(name)
        start = digests(model, name)
        train(model, seed)
        moved = {key for key, value in digests(model, name).items() if value != start[key]}
        assert any("sapt_B" in key for key in moved), "the block of the task learns"
        model.commit_task()
        step_on_frozen(model)
        assert {old: digests(model, old) for old in kept} == kept, "old tasks keep every byte"
        kept[name] = digests(model, name)
    assert model.committed_tasks == ["a", "b", "c"]
    torch.testing.assert_close(model.base_model.hooks.memory.targets("default").sum(dim=1), torch.ones(3))
    model.reopen_task()
    assert model.committed_tasks == ["a", "b"]
    step(model)
    model.commit_task()
    kept["c"] = digests(model, "c")
    model.remove_task("b")
    assert model.tasks == ["a", "c"] and {name: digests(model, name) for name in "ac"} == {n: kept[n] for n in "ac"}
    weights = model.attention_weights(**padded(ROWS))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))
    model.add_task("d")
    train(model, 5)
    model.commit_task()
    assert model.committed_tasks == ["a", "c", "d"] and digests(model, "a") == kept["a"]


def step_on_frozen(model) -> None:
    """A forward in train mode after the commit: there is nothing left to train."""
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".sapt_" in name]


def in_thread(work) -> None:
    """Run ``work`` in a thread of its own; its error is ours."""
    failed = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed


def test_trained_in_one_thread_and_committed_in_another(family: str, kind: str) -> None:
    """The rows that training saw belong to the pool: the commit is that of a run in one thread."""
    alone, apart = fresh(family, kind), fresh(family, kind)
    train(alone)
    alone.commit_task()
    in_thread(lambda: train(apart))
    in_thread(apart.commit_task)
    assert apart.committed_tasks == ["a"] and digests(apart, "a") == digests(alone, "a")
    for model in (alone, apart):
        torch.manual_seed(1)  # of the new key
        model.add_task("b")
    train(alone, 1)
    alone.commit_task()
    in_thread(lambda: train(apart, 1))
    apart.commit_task()
    mine, its = (m.base_model.hooks.memory.targets("default") for m in (alone, apart))
    assert torch.equal(mine, its) and len(set(mine[1].tolist())) == 2


def test_a_copy_commits_what_the_original_was_trained_on(kind: str) -> None:
    model = fresh("llama", kind)
    train(model)
    twin = copy.deepcopy(model)
    model.commit_task()
    twin.commit_task()
    assert digests(twin, "a") == digests(model, "a")


def test_a_commit_of_nothing_is_refused_with_the_cure(kind: str, tmp_path) -> None:
    """In eval mode, or loaded in the middle of a task, no row is known; the first key would stay random."""
    batch = [padded(ROWS)]
    model = fresh("llama", kind)
    for call in (model.commit_task, lambda: model.add_task("b"), lambda: model.commit_task(inputs=[])):
        with pytest.raises(TaskError, match=r"no training prompt|got no row"):
            call()
    model.eval()
    labels = batch[0]["input_ids"].masked_fill(batch[0]["attention_mask"] == 0, -100)
    labels[:, :-1] = -100
    if model.base_model.router.needs_replay:
        model(**batch[0], labels=labels).loss.backward()  # a gradient, but no training
    else:
        with pytest.raises(TrainingError, match=r"eval mode.*model\.train\(\)"):
            model(**batch[0], labels=labels)
    with pytest.raises(TaskError, match=r"eval mode.*commit_task\(inputs=batches\)"):
        model.commit_task()
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("llama", kind).unload(), tmp_path, is_trainable=True)
    with pytest.raises(TaskError, match=r"its file does not keep the rows.*commit_task\(inputs=batches\)"):
        loaded.commit_task()
    assert loaded.committed_tasks == model.committed_tasks == []
    loaded.commit_task(inputs=batch)
    assert loaded.committed_tasks == ["a"]
    query = getattr(loaded.base_model.router, "query", None)
    if query is not None:
        mean = query(loaded.pooled_prompts(batch), "default").mean(dim=0)
        key = loaded.task_state("a")["shared_attention.sapt_key"][0]
        torch.testing.assert_close(torch.cosine_similarity(key, mean, dim=0), torch.tensor(1.0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rows_weights_are_its_own(family: str, kind: str, side: str) -> None:
    pool = build_pool(family, ["a", "b", "c"], router=kind).eval()
    batch = padded(ROWS, side, extra=3)
    weights = pool.attention_weights(**batch)
    assert_real_pool(weights)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(weights[i : i + 1], pool.attention_weights(**padded([row])), atol=1e-6, rtol=0)


@pytest.mark.parametrize("light", [False, True])
def test_saved_and_loaded(family: str, kind: str, light: bool, tmp_path) -> None:
    model = learned(family, kind)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=light)
    assert loaded.tasks == ["a", "b", "c"] and loaded.committed_tasks == ["a", "b", "c"]
    mine, its = (m.eval().attention_weights(**padded(ROWS)) for m in (model, loaded))
    assert torch.equal(mine, its)
    for name in "abc":
        assert digests(loaded, name) == digests(model, name)
    loaded.add_task("d")
    train(loaded, 7)
    loaded.commit_task()
    assert {n: digests(loaded, n) for n in "abc"} == {n: digests(model, n) for n in "abc"}


def test_a_changed_router_is_not_loaded(kind: str, tmp_path) -> None:
    model = learned("llama", kind)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    own = [key for key in tensors if f".{ROUTERS[kind].module_name}." in key]
    assert own
    tensors[own[0]].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ChangedTensorError, match=ROUTERS[kind].module_name):
        PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_holds_the_weights_of_each_prompt(family: str, kind: str, beams: int) -> None:
    pool = build_pool(family, ["a", "b", "c"], router=kind).eval()
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    batch = padded(ROWS)
    written = pool.generate(**batch, **how)
    weights = pool.attention_weights(**batch)
    assert torch.equal(written, pool.generate(**batch, sapt_weights=weights, **how))
    other = pool.generate(**batch, sapt_weights=[0.0, 0.0, 5.0], **how)
    assert not torch.equal(written, other), "the weights count"
    for i, row in enumerate(ROWS):
        assert torch.equal(written[i, -5:], pool.generate(**padded([row]), **how)[0, -5:])


def test_the_card_says_how_prompts_find_their_block(kind: str, tmp_path) -> None:
    model, router = learned("llama", kind), ROUTERS[kind]
    if router.needs_replay:
        model.reopen_task()
        model.commit_task(inputs=[padded(ROWS)], replay=[padded(ROWS)])
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert router.description in card and router.keeps in card
    assert all(f"<code>{name}</code>" in card for name in "abc")
    assert (tmp_path / "attention.png").stat().st_size > 0 and "own weight" in card


def test_fields_of_other_routers_are_refused(kind: str) -> None:
    assert SaptConfig(router=kind, fallback=0.5).fallback == 0.5
    if kind == "attention":
        assert SaptConfig(router=kind, pool_padding=True).pool_padding
    else:
        with pytest.raises(SaptError, match=r"SaptConfig\.pool_padding"):
            SaptConfig(router=kind, pool_padding=True)
    with pytest.raises(SaptError, match=r"SaptConfig\.router must be .*'ridge'"):
        SaptConfig(router="nearest")


def test_pools_with_different_routers_share_a_base() -> None:
    """Each answers by its own; deleting one leaves the others as they were."""
    model = build_pool("llama", ["a", "b", "c"]).eval()
    expected = {"default": model.attention_weights(**padded(ROWS))}
    for kind in list(ROUTERS)[1:]:
        model.add_adapter(
            kind, SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b", "c"], router=kind, init_weights=False)
        )
        model.set_adapter(kind)
        expected[kind] = model.attention_weights(**padded(ROWS))
        assert_real_pool(expected[kind])
    for name, weights in expected.items():
        model.set_adapter(name)
        assert torch.equal(model.attention_weights(**padded(ROWS)), weights)
    model.set_adapter("default")
    for kind in list(ROUTERS)[1:]:
        model.delete_adapter(kind)
    assert torch.equal(model.attention_weights(**padded(ROWS)), expected["default"])
