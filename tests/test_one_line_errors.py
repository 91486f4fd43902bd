"""What cannot work says in one line what, where and the cure, where torch or PEFT would say something else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from helpers.tiny import build_pool, commit, labelled, padded, tiny_llama, token_rows
from helpers.training import arguments, fresh_pool
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.errors import PromptError, SaptError, TrainingError, WeightsError

TASKS = ["a", "b", "c"]
ROWS = token_rows([6, 9, 7])
CONFIG = {"task_type": "CAUSAL_LM", "task_name": "x"}


# --- a pool on a model that has one ----------------------------------------------------------------------------------


WRAPPED: dict[str, Callable[[PeftModel], torch.nn.Module]] = {
    "the PeftModel": lambda model: model,
    "its tuner": lambda model: model.base_model,
    "the model under it": lambda model: model.get_base_model(),
    "a copy": copy.deepcopy,
    "a module that holds it": lambda model: torch.nn.ModuleDict({"inner": model}),
}


@pytest.mark.parametrize("config", [SaptConfig(**CONFIG), SaptConfig(**CONFIG, router="ridge", block="prompt")])
@pytest.mark.parametrize("what", WRAPPED)
def test_a_second_pool_around_the_first(what: str, config: SaptConfig) -> None:
    model = build_pool("llama", TASKS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SaptError, match=r"holds a pool already.*add_task.*add_adapter.*unload\(\)"):
        get_peft_model(WRAPPED[what](model), copy.deepcopy(config))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], v) for k, v in after.items())


def test_the_ways_that_the_message_names() -> None:
    model = build_pool("llama", TASKS)
    model.add_adapter("second", SaptConfig(**CONFIG))
    assert get_peft_model(model.unload(), SaptConfig(**CONFIG)).tasks == ["x"]


# --- nothing would train ---------------------------------------------------------------------------------------------


def loss_of(model, how: str) -> torch.Tensor:
    """Supervised, or by preferences: log-likelihoods of answers under the pool and under the base model alone."""
    batch = labelled("llama", ROWS)
    if how == "supervised":
        return model(**batch).loss
    labels = batch.pop("labels")
    with model.disable_adapter(), torch.no_grad():
        reference = model(**batch).logits.log_softmax(-1)
    ours = model(**batch, sapt_prompt_mask=labels == -100).logits.log_softmax(-1)
    chosen = (ours - reference).gather(-1, batch["input_ids"].unsqueeze(-1)).squeeze(-1)
    return -torch.nn.functional.logsigmoid(chosen[0].sum() - chosen[1].sum())


@pytest.mark.parametrize("how", ["supervised", "preferences"])
@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("block", ["lora", "prompt"])
def test_a_committed_pool(block: str, router: str, how: str) -> None:
    model = build_pool("llama", TASKS, block=block, router=router).train()
    commit(model)
    with pytest.raises(
        TrainingError, match=r"Nothing would train: the newest task 'c' is committed.*add_task.*reopen"
    ):
        loss_of(model, how)
    model.reopen_task()
    if router == "attention":
        loss_of(model, how).backward()
    with torch.no_grad():
        commit(model)
        loss_of(model, how)  # asking is fine in any mode


@pytest.mark.parametrize("callbacks", ["with ARM", "without", "own loop"])
@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_a_pool_loaded_for_inference(router: str, callbacks: str, tmp_path) -> None:
    model = fresh_pool(router=router)
    model.save_pretrained(tmp_path / "pool")
    model = PeftModel.from_pretrained(model.unload(), tmp_path / "pool")
    arm = [ArmCallback(tokenizer(), replay="rows", align_steps=2)] if callbacks == "with ARM" else []
    run = Trainer(
        model, arguments(tmp_path), train_dataset=rows_of("a"), data_collator=collate, callbacks=arm,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"loaded for inference.*is_trainable=True"):
        if callbacks == "own loop":
            model.train()(**collate(rows_of("a")[:4])).loss.backward()
        else:
            run.train()


def test_everything_frozen_by_hand() -> None:
    model = fresh_pool()
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"no parameter has requires_grad=True.*set_adapter"):
        model.train()(**collate(rows_of("a")[:4]))
    model.base_model.set_adapter("default")
    model(**collate(rows_of("a")[:4])).loss.backward()


def test_gradients_to_embeddings_alone_are_let_through() -> None:
    """Attribution on a committed pool: what is asked is a gradient to the input."""
    model = build_pool("llama", TASKS).train()
    commit(model)
    embeddings = model.get_input_embeddings()(torch.tensor(token_rows([7]))).detach().requires_grad_(True)
    model(inputs_embeds=embeddings, sapt_prompt_mask=torch.ones(1, 7)).logits.sum().backward()
    assert bool(embeddings.grad.any())


# --- no numbers to route by ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_a_model_on_the_meta_device(router: str) -> None:
    model = build_pool("llama", TASKS, router=router).to("meta").eval()
    with pytest.raises(PromptError, match=r"LlamaForCausalLM are on the meta device.*to_empty"):
        model(torch.tensor(token_rows([5])).to("meta"))


class Headless(torch.nn.Module):
    """A text model that does not say where its embeddings are."""

    main_input_name, is_gradient_checkpointing = "input_ids", False

    def __init__(self, error: type[Exception] | None) -> None:
        super().__init__()
        self.table, self.head, self.error = torch.nn.Embedding(100, 8), torch.nn.Linear(8, 8), error
        if error is not None:
            self.get_input_embeddings = self.refuse

    def refuse(self) -> None:
        raise self.error("not here")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(input_ids))


@pytest.mark.parametrize("error", [None, NotImplementedError, AttributeError])
def test_a_model_without_known_embeddings(error) -> None:
    config = SaptConfig(target_modules=["head"], token_dim=8, tasks=TASKS, init_weights=False)
    model, ids = get_peft_model(Headless(error), config).eval(), torch.tensor(token_rows([5, 5]))
    with pytest.raises(PromptError, match=r"A Headless gives no token embeddings.*sapt_weights=\[B, T\] or sapt_task"):
        model(input_ids=ids)
    assert model(input_ids=ids, sapt_task="b").shape == (2, 5, 8)


# --- what goes well with a pool --------------------------------------------------------------------------------------


def test_a_pool_around_merged_lora_is_a_pool() -> None:
    torch.manual_seed(0)
    tuned = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).merge_and_unload()
    assert get_peft_model(tuned, SaptConfig(**CONFIG))(**padded(ROWS)).logits.isfinite().all()


# --- training in eval mode, and a pool under somebody's own head -----------------------------------------------------


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"min_weight": 0.5}, {"router": "ridge"}])
def test_training_in_eval_mode_that_would_leave_the_new_block_out(settings: dict[str, object]) -> None:
    model, batch = fresh_pool(**settings), collate(rows_of("a")[:4])
    if "router" not in settings:
        model.commit_task([batch])
        model.add_task("b")
    with pytest.raises(TrainingError, match=r"in eval mode.*model\.train\(\).*torch\.no_grad\(\)"):
        model.eval()(**batch)
    with torch.no_grad():
        model(**batch)
    if "router" in settings:
        model.fit_router([batch])
    model.train()(**batch).loss.backward()


def test_training_in_eval_mode_is_training_where_nothing_is_left_out() -> None:
    gradients = []
    for mode in (True, False):
        model = fresh_pool()
        model.train(mode)(**collate(rows_of("a")[:4])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


class Classifier(torch.nn.Module):
    """A frozen pool as a backbone."""

    def __init__(self, pool: PeftModel, trains: bool) -> None:
        super().__init__()
        self.backbone, self.head = pool, torch.nn.Linear(64, 2).requires_grad_(trains)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(ids, output_hidden_states=True).hidden_states[-1][:, -1])


def test_a_backbone_under_a_head_that_trains(tmp_path) -> None:
    model, ids = build_pool("llama", TASKS), torch.tensor(token_rows([6, 6]))
    model.save_pretrained(tmp_path)
    commit(model)
    for pool in (model, PeftModel.from_pretrained(build_pool("llama", TASKS).unload(), tmp_path)):
        classifier = Classifier(pool, trains=True).train()
        classifier(ids).sum().backward()
        assert bool(classifier.head.weight.grad.any())
        with pytest.raises(TrainingError, match="Nothing would train"):
            Classifier(pool, trains=False).train()(ids)


def test_add_weighted_adapter() -> None:
    with pytest.raises(SaptError, match=r"sapt_weights.*export_mixture.*import_task"):
        build_pool("llama", TASKS).add_weighted_adapter(["default"], [1.0], "mixed")


class Passing(torch.nn.Module):
    """A wrapper that hands on whatever it gets."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.get_input_embeddings = inner.get_input_embeddings

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_wrapper_that_is_called_by_position() -> None:
    torch.manual_seed(0)
    pool = get_peft_model(
        Passing(tiny_llama()), SaptConfig(target_modules=["q_proj"], tasks=TASKS, init_weights=False)
    )
    ids = torch.tensor(token_rows([5]))
    with torch.no_grad():
        torch.testing.assert_close(pool.eval()(ids).logits, pool(input_ids=ids).logits)


def test_accelerates_offload() -> None:
    model, ids = build_pool("llama", TASKS).eval(), torch.tensor(token_rows([6]))
    cpu_offload(model, torch.device("cpu"))
    for given in ({}, {"sapt_task": "a"}):
        with pytest.raises((WeightsError, PromptError), match=r"meta device.*cpu_offload.*device_map"):
            model(ids, **given)
