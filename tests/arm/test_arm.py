"""ARM: a new task gets its weight, old tasks keep their attention, and the Trainer sees one clean gradient."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from helpers.tiny import build_pool, padded, tiny_llama, tiny_t5
from helpers.training import arguments, fresh_pool, learn_stream, own_weights, trainer
from helpers.words import MARKS, TASKS, collate, rows_of, tokenizer
from peft_sapt import ArmCallback, GeneratorSettings, SaptConfig, create_optimizer
from peft_sapt.arm.objective import attention_loss, floor_shortfall, replay_divergence
from peft_sapt.arm.pseudo import Selection, digest_of, wanted_count
from peft_sapt.errors import ReflectionError, TaskError


def test_every_new_task_gets_its_weight_and_old_ones_keep_theirs(tmp_path) -> None:
    model, scales = learn_stream(tmp_path, ArmCallback(tokenizer(), replay="rows"))
    assert model.committed_tasks == TASKS
    for task, (leading, mean) in own_weights(model).items():
        assert leading >= 0.95 and mean >= 0.5, (task, leading, mean)
    for task in TASKS[1:]:
        assert min(scales[task]) >= 0.5, scales


def test_replay_alone_takes_the_new_tasks_weight(tmp_path) -> None:
    """The defect of the released method, reproduced by switching our remedies off."""
    arm = ArmCallback(tokenizer(), replay="rows", align_steps=0, floor_weight=0.0)
    model = fresh_pool(features="max")
    trainer(model, tmp_path, "a", [arm]).train()
    model.add_task("b")
    args = arguments(tmp_path, max_steps=60)
    optimizer = create_optimizer(model, args, attention_lr=1e-2)
    run = Trainer(
        model=model,
        args=args,
        train_dataset=rows_of("b"),
        data_collator=collate,
        callbacks=[arm],
        optimizers=optimizer,
    )
    run.train()
    assert own_weights(model)["b"][1] < 0.1


def test_generated_pseudo_samples_hold_the_stream(tmp_path) -> None:
    settings = GeneratorSettings(epochs=40, learning_rate=1e-2, lora_dropout=0.0)
    arm = ArmCallback(tokenizer(), replay="generated", generator=settings)
    model = fresh_pool(target_modules="all-linear")
    base = {k: v.clone() for k, v in model.state_dict().items() if "sapt_" not in k}
    for task in TASKS[:2]:
        if task not in model.tasks:
            model.add_task(task)
        trainer(model, tmp_path, task, [arm]).train()
    for task in TASKS[:2]:
        report = arm.reports[task]
        assert report["kept"] == report["wanted"] == 20
        first, last = report["generator_loss"]
        assert last < 0.95 * first, "the generator must have learned something"
        words = " ".join(arm.pseudo_samples[task]).split()
        own = {f"w{i}" for i in MARKS[task]} | {"w5"}
        share = sum(word in own for word in words) / len(words)
        assert share >= 2 * len(own) / 100, "pseudo-samples must look like the task, not like chance"
        training = {" ".join(f"w{i}" for i in row["input_ids"][:-1]) for row in rows_of(task)}
        assert len(set(arm.pseudo_samples[task])) == 20
        assert not training & set(arm.pseudo_samples[task])
    assert [len(r) for r in model.base_model.hooks.memory.replay("default")] == [20, 20]
    leading = own_weights(model)
    # the base is random, so its generator writes half of its words off the task: chance is 0.5, real rows reach 0.95
    assert leading["a"][0] >= 0.8 and leading["b"][0] >= 0.8, leading
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if "sapt_" not in k)
    arm.save_replay(tmp_path / "pool")
    assert len((tmp_path / "pool/replay/a.jsonl").read_text().splitlines()) == 20


def test_the_generator_of_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_t5(), SaptConfig(task_type="SEQ_2_SEQ_LM", task_name="a", target_modules=["q", "k", "v", "o", "wi", "wo"])
    )
    settings = GeneratorSettings(epochs=20, learning_rate=1e-2, lora_dropout=0.0)
    arm = ArmCallback(tokenizer(), replay="generated", generator=settings)
    batches = [
        {**padded([r["input_ids"][:-1] for r in rows_of("a")][i : i + 20]), "labels": torch.full((20, 2), 7)}
        for i in (0, 20, 40)
    ]
    arm.prepare(model, batches)
    arm.reflect(model)
    assert arm.reports["a"]["kept"] == 20
    first, last = arm.reports["a"]["generator_loss"]
    assert last < first
    assert model.committed_tasks == ["a"]


class Gradients(TrainerCallback):
    """Records the gradient that reaches the first optimizer step, after clipping."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_is_the_hand_written_sum(tmp_path, accumulation: int, clip: float, smoothing: float) -> None:
    model = fresh_pool()
    trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="rows")]).train()
    model.add_task("b")
    arm, seen = ArmCallback(tokenizer(), align_steps=0, replay="rows", new_task_floor=0.99), Gradients()
    batches: list[dict[str, torch.Tensor]] = []

    def recording(rows):
        batches.append(collate(rows))
        return batches[-1]

    args = arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clip,
        label_smoothing_factor=smoothing,
        learning_rate=1e-12,
    )
    state = {k: v.clone() for k, v in model.state_dict().items()}
    run = Trainer(model=model, args=args, train_dataset=rows_of("b"), data_collator=recording, callbacks=[arm, seen])
    run.train()
    model.reopen_task()
    model.base_model.pool.statistics.close("default")  # as if it had never been committed
    model.load_state_dict(state)
    trained = [b for b in batches if b["input_ids"].shape[0] == 8 // accumulation][:accumulation]
    model.train().zero_grad()
    arm.prepare(model, [collate(rows_of("b")[i : i + 32]) for i in (0, 32)])
    arm.penalty(model, arm.seed_of(args, model.base_model)).backward()
    total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in trained)
    for batch in trained:
        labels = batch["labels"]
        out = model(**{k: v for k, v in batch.items() if k != "labels"} if smoothing else batch)
        logp = F.log_softmax(out.logits[:, :-1], -1)
        kept = labels[:, 1:] != -100
        nll = -logp.gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)[kept].sum() / total
        smooth = -logp.sum(-1)[kept].sum() / (total * logp.shape[-1])
        ((1 - smoothing) * nll + smoothing * smooth).backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if clip:
        norm = torch.stack([g.norm() for g in mine.values()]).norm()
        mine = {n: g * min(1.0, clip / float(norm + 1e-6)) for n, g in mine.items()}
    assert mine.keys() == seen.found.keys()
    for name, gradient in seen.found.items():
        assert (gradient - mine[name]).norm() <= 1e-4 * mine[name].norm() + 1e-9, name


def test_one_lambda_means_the_same_for_any_number_of_old_tasks() -> None:
    """Repeating the old tasks leaves the loss as it is."""
    losses = []
    for copies in (1, 3):
        model = build_pool("llama", ["old"] + [f"again_{i}" for i in range(copies - 1)] + ["new"], temperature=1.0)
        attention = model.base_model.attention
        rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        memory = model.base_model.hooks.memory
        memory.set_replay("default", [rows] * copies + [rows[:0]])
        targets = memory.targets("default")
        for i in range(copies):
            targets[i] = 0
            targets[i, :copies] = 1 / copies
        with torch.no_grad():
            for name in ("sapt_old_keys", "sapt_key"):
                getattr(attention, name)["default"].weight.zero_()
        losses.append(float(attention_loss(model.base_model.pool, rows, floor_weight=0.0)))
        expected = math.log((copies + 1) / copies)
        assert losses[-1] == pytest.approx(expected, abs=1e-5)


def test_terms_of_the_objective_by_hand() -> None:
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    target = torch.tensor([0.9, 0.1, 0.0])
    kl = sum(0.9 * math.log(0.9 / w[0]) + 0.1 * math.log(0.1 / w[1]) for w in weights.tolist()) / 2
    assert float(replay_divergence(weights.log(), target)) == pytest.approx(kl, rel=1e-5)
    short = (math.log(0.5 / 0.1) + 0.0) / 2
    assert float(floor_shortfall(weights.log(), 0.5)) == pytest.approx(short, rel=1e-5)


def test_attention_gets_no_gradient_from_old_keys_and_replay() -> None:
    model = build_pool("llama", TASKS)
    attention = model.base_model.attention
    memory = model.base_model.hooks.memory
    memory.targets("default")[:2] = torch.eye(3)[:2]
    memory.set_replay("default", [torch.randn(4, 64), torch.randn(5, 64), torch.zeros(0, 64)])
    attention_loss(model.base_model.pool, torch.randn(7, 64)).backward()
    moved = {n.split(".")[0] for n, p in attention.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"sapt_query_down", "sapt_query_up", "sapt_query_norm", "sapt_key"}


def test_a_resumed_run_is_bit_identical(tmp_path) -> None:
    def pool_with_one_task():
        model = fresh_pool()
        trainer(model, tmp_path / "first", "a", [ArmCallback(tokenizer(), replay="rows")]).train()
        model.add_task("b")
        return model

    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    whole = pool_with_one_task()
    trainer(whole, tmp_path / "run", "b", [ArmCallback(tokenizer(), replay="rows")], **settings).train()
    resumed = pool_with_one_task()
    run = trainer(resumed, tmp_path / "run", "b", [ArmCallback(tokenizer(), replay="rows")], **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-5"))
    assert resumed.committed_tasks == whole.committed_tasks == ["a", "b"]
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_interrupted_before_the_commit(tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            raise KeyboardInterrupt

    model = fresh_pool()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="rows"), Stop()]).train()
    assert model.tasks == ["a"] and model.committed_tasks == []
    model.add_task("b")  # commits what was learned of a, without replay rows
    assert model.committed_tasks == ["a"]
    model.base_model.pool.statistics.sapt_counts["default"].weight.data.zero_()  # nor its statistics, as if imported
    with pytest.raises(ReflectionError, match=r"\['a'\] have neither replay rows nor statistics"):
        trainer(model, tmp_path, "b", [ArmCallback(tokenizer(), replay="generated")]).train()
    model.remove_task("b")
    model.reopen_task()
    trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="rows")]).train()
    assert model.committed_tasks == ["a"]


def test_trained_twice_is_refused_by_name(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay="rows")
    trainer(model, tmp_path, "a", [arm]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TaskError, match=r"'a' is committed.*add_task.*reopen_task"):
        Trainer(
            model=model, args=arguments(tmp_path), train_dataset=rows_of("a"), data_collator=collate, callbacks=[arm]
        ).train()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_too_few_pseudo_samples_leave_the_task_open(tmp_path) -> None:
    model = fresh_pool()
    arm = ArmCallback(tokenizer(), replay="generated", generator=GeneratorSettings(epochs=0.1, max_draws=1))
    with pytest.raises(ReflectionError, match=r"(?s)'a' gave \d+ usable pseudo-samples of 20.*not committed.*reflect"):
        trainer(model, tmp_path, "a", [arm]).train()
    assert model.committed_tasks == [] and list(model.peft_config) == ["default"]
    arm.replay = "rows"
    arm.reflect(model)
    assert model.committed_tasks == ["a"]


def test_refusals_before_training(tmp_path) -> None:
    class Endless(IterableDataset):
        def __iter__(self):
            yield from rows_of("a")

    arm = ArmCallback(tokenizer(), replay="rows")
    with pytest.raises(ReflectionError, match="map-style"):
        Trainer(
            model=fresh_pool(),
            args=arguments(tmp_path),
            train_dataset=Endless(),
            data_collator=collate,
            callbacks=[arm],
        ).train()
    with pytest.raises(ReflectionError, match="get_peft_model"):
        Trainer(
            model=tiny_llama(), args=arguments(tmp_path), train_dataset=rows_of("a"), data_collator=collate,
            callbacks=[arm],
        ).train()  # fmt: skip
    import datasets

    model = fresh_pool()
    arm.prepare(model.base_model, [collate(rows_of("a"))])  # the tuner will do too
    arm.reflect(model)
    model.add_task("b")
    named = datasets.Dataset.from_list([{**row, "task": "a"} for row in rows_of("a", 8)])
    with pytest.raises(TaskError, match=r"belong to task \['a'\].*current task 'b'"):
        args = arguments(tmp_path, remove_unused_columns=False)  # else the Trainer drops the column task
        Trainer(model=model, args=args, train_dataset=named, data_collator=collate, callbacks=[arm]).train()


def test_selection_counts_every_refusal() -> None:
    selection = Selection(wanted=2, known={digest_of([4, 5])}, special={1, 2}, allow_copies=False)
    for row, finished in [
        ([4, 5], True),
        ([], True),
        ([1], True),
        ([6], False),
        ([7], True),
        ([7], True),
        ([8], True),
    ]:
        selection.offer(row, finished)
    report = selection.report.to_dict()
    assert selection.kept == [[7], [8]] and selection.missing == 0
    assert {k: report[k] for k in ("drawn", "unfinished", "empty", "duplicates", "copies", "kept")} == {
        "drawn": 7, "unfinished": 1, "empty": 2, "duplicates": 1, "copies": 1, "kept": 2,
    }  # fmt: skip
    assert (wanted_count(100, 0.02, 20), wanted_count(5000, 0.02, 20)) == (20, 100)


class Stop(TrainerCallback):
    """Ends a run before its first step."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("tasks", "own_groups", "warned"), [(["a"], False, 0), (["a", "b"], False, 1), (["a", "b"], True, 0)]
)
def test_a_fast_attention_is_warned_of_from_the_second_task_on(tmp_path, tasks, own_groups: bool, warned: int) -> None:
    model, arm, args = build_pool("llama", tasks), ArmCallback(tokenizer(), replay="rows"), arguments(tmp_path)
    replay = [torch.randn(4, 64) for _ in tasks[:-1]] + [torch.zeros(0, 64)]
    model.base_model.hooks.memory.set_replay("default", replay)
    optimizers = create_optimizer(model, args, attention_lr=1e-3) if own_groups else (None, None)
    run = Trainer(
        model=model, args=args, train_dataset=rows_of("b"), data_collator=collate, callbacks=[arm, Stop()],
        optimizers=optimizers,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught, pytest.raises(KeyboardInterrupt):
        warnings.simplefilter("always")
        run.train()
    assert sum("loosens that of old tasks" in str(w.message) for w in caught) == warned
