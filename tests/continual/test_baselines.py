"""Each baseline against the definition in its paper, computed another way; and what it must leave untouched."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from helpers.bench import tiny_bench
from helpers.tiny import tiny_t5
from peft_sapt.continual import bounds
from peft_sapt.continual.baselines import lfpt5, o_lora, replay
from peft_sapt.continual.baselines.epi import EPI, SHRINKAGE, Statistics
from peft_sapt.continual.baselines.features import Features
from peft_sapt.continual.baselines.l2p import CHOSEN, L2P, POOL, PULL, PromptPool
from peft_sapt.continual.baselines.lfpt5 import LFPT5, answer_logits, distillation
from peft_sapt.continual.baselines.o_lora import OLora, orthogonality
from peft_sapt.continual.baselines.prefixed import PrefixedModel
from peft_sapt.continual.baselines.prog_prompt import ProgPrompt, ProgPromptKnown, Progressive
from peft_sapt.continual.baselines.replay import Replay
from peft_sapt.continual.bounds import MultiTask, PerTask
from peft_sapt.continual.learner import PenaltyTrainer, encoded
from peft_sapt.continual.method import learn_stream
from peft_sapt.continual.prompts import Collator


@pytest.fixture(params=["llama", "t5"])
def bench(request, tmp_path):
    bench = tiny_bench(tmp_path, rows=24)
    bench.budget.prompt_epochs, bench.budget.prompt_lr = 1.0, 0.05
    if request.param == "t5":
        torch.manual_seed(0)
        bench.base, bench.budget.layers = tiny_t5(), 0
    return bench


def bytes_of(parameters) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in parameters]


def batch_of(bench, name: str = "first", count: int = 4):
    collate = Collator(bench.tokenizer.pad_token_id, bench.encoder_decoder, sapt=True)
    return collate(encoded(bench, name)[:count])


# -- bounds


def test_per_task_is_a_fresh_lora_for_each(bench) -> None:
    """Both adapters of one model equal, bit for bit, what two models learn that never met."""
    method = PerTask(bench)
    for name in bench.stream:
        method.learn(name)
    for index, name in enumerate(bench.stream):
        alone = bounds.Sequential(bench)  # seeds, then makes a LoRA
        alone.learn(name)
        theirs = {k: v for k, v in alone.model.named_parameters() if "lora_" in k}
        assert theirs and any(bool(v.abs().sum() > 0) for k, v in theirs.items() if "lora_B" in k)
        mine = dict(method.model.named_parameters())
        for key, value in theirs.items():
            assert torch.equal(mine[key.replace("default", f"task_{index}")], value), key


def test_multi_task_sees_every_row_once_an_epoch(bench, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(bounds, "train", lambda bench, model, name, callbacks, rows: seen.append(rows))
    method = MultiTask(bench)
    for name in bench.stream:
        method.learn(name)
    [rows] = seen
    assert rows == encoded(bench, "first") + encoded(bench, "second")


def test_replay_mixes_in_rows_of_every_old_task(bench, monkeypatch) -> None:
    seen, train = [], replay.train

    def spying(bench, model, name, callbacks, rows):
        seen.append(rows)
        return train(bench, model, name, callbacks, rows=rows)

    monkeypatch.setattr(replay, "train", spying)
    method = Replay(bench)
    before = method.stored_bytes()
    for name in bench.stream:
        method.learn(name)
    assert seen[0] == encoded(bench, "first")
    assert seen[1][:24] == encoded(bench, "second") and len(seen[1]) == 24 + 20
    assert all(row in seen[0] for row in seen[1][24:])
    assert {len(rows) for rows in method.memory.values()} == {20} and method.stored_bytes() > before


# -- O-LoRA


def test_o_loras_penalty_and_its_gradient(bench) -> None:
    method = OLora(bench)
    for name in bench.stream:
        method.learn(name)
    model = method.model
    model.zero_grad()
    found = orthogonality(model, ["task_0"], "task_1")
    found.backward()
    total, layers = 0.0, 0
    for module in model.modules():
        if hasattr(module, "lora_A") and "task_1" in module.lora_A:
            new, old = (module.lora_A[t].weight.detach().double().numpy() for t in ("task_1", "task_0"))
            product = np.array([[float(a @ b) for b in old] for a in new])
            total, layers = total + np.abs(product).sum(), layers + 1
            # d|a_i . b_j| / d a_i = sign(a_i . b_j) b_j
            gradient = np.stack([sum(np.sign(line[j]) * old[j] for j in range(len(old))) for line in product])
            np.testing.assert_allclose(module.lora_A["task_1"].weight.grad, gradient, rtol=1e-4, atol=1e-6)
            assert module.lora_A["task_0"].weight.grad is None
    assert layers > 1 and found.item() == pytest.approx(total, rel=1e-5)


def test_o_lora_freezes_the_old_and_adds_all_up(bench) -> None:
    method = OLora(bench)
    method.learn("first")
    old = bytes_of(p for k, p in method.model.named_parameters() if ".task_0." in k)
    method.learn("second")
    assert bytes_of(p for k, p in method.model.named_parameters() if ".task_0." in k) == old
    for module in method.model.modules():
        if hasattr(module, "lora_A") and "task_1" in module.lora_A:
            x = torch.randn(3, module.in_features)
            by_hand = module.base_layer(x)
            for t in ("task_0", "task_1"):
                by_hand = by_hand + module.scaling[t] * x @ module.lora_A[t].weight.T @ module.lora_B[t].weight.T
            torch.testing.assert_close(module(x), by_hand)
    trainable = {k.split(".")[-2] for k, p in method.model.named_parameters() if p.requires_grad}
    assert trainable == {"task_1"}


def test_o_loras_penalty_makes_new_subspaces_orthogonal(bench, monkeypatch) -> None:
    found = {}
    for weight in (0.0, 5.0):
        monkeypatch.setattr(o_lora, "WEIGHT", weight)
        method = OLora(bench)
        for name in bench.stream:
            method.learn(name)
        found[weight] = float(orthogonality(method.model, ["task_0"], "task_1").detach())
    assert found[5.0] < 0.5 * found[0.0]


def test_a_penalty_is_added_to_the_loss_once(bench) -> None:
    method = bounds.Sequential(bench)
    trainer = PenaltyTrainer(model=method.model)
    batch = {k: v for k, v in batch_of(bench).items() if k != "sapt_prompt_mask"}
    method.model.train()
    plain = trainer.compute_loss(method.model, dict(batch))
    trainer.penalty = lambda model: torch.tensor(1.5)
    assert float(trainer.compute_loss(method.model, dict(batch)) - plain) == pytest.approx(1.5, abs=1e-5)
    method.model.eval()
    assert float(trainer.compute_loss(method.model, dict(batch)) - plain) == pytest.approx(0, abs=1e-5)


# -- virtual tokens


class Fixed(torch.nn.Module):
    def __init__(self, prompt: torch.Tensor) -> None:
        super().__init__()
        self.prompt = torch.nn.Parameter(prompt)

    def forward(self, input_ids, prompt_mask):
        return self.prompt.expand(len(input_ids), -1, -1)


def test_virtual_tokens_are_pefts_prompt_tuning(bench) -> None:
    torch.manual_seed(1)
    kind = "SEQ_2_SEQ_LM" if bench.encoder_decoder else "CAUSAL_LM"
    peft = get_peft_model(copy.deepcopy(bench.base), PromptTuningConfig(task_type=kind, num_virtual_tokens=3)).eval()
    mine = PrefixedModel(copy.deepcopy(bench.base), Fixed(peft.get_prompt_embedding_to_save("default")[:3])).eval()
    ids = torch.randint(4, 60, (2, 6))
    labels = torch.randint(4, 60, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = peft(**batch, labels=labels)
    if bench.encoder_decoder:
        ours = mine(**batch, labels=labels)
        torch.testing.assert_close(ours.logits, theirs.logits)
        torch.testing.assert_close(ours.loss, theirs.loss)
    else:
        torch.testing.assert_close(mine(**batch).logits, theirs.logits)
    out = mine.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=1)
    torch.testing.assert_close(out, greedy(peft, ids, 4, bench.encoder_decoder))


@torch.no_grad()
def greedy(peft, ids: torch.Tensor, count: int, encoder_decoder: bool) -> torch.Tensor:
    """``count`` tokens by whole forwards of PEFT's model, without a cache, which its own ``generate`` may lose."""
    mask, found = torch.ones_like(ids), torch.full((len(ids), 1), 1) if encoder_decoder else ids
    for _ in range(count):
        if encoder_decoder:
            logits = peft(input_ids=ids, attention_mask=mask, decoder_input_ids=found).logits
        else:
            logits = peft(input_ids=found, attention_mask=torch.ones_like(found)).logits
        found = torch.cat([found, logits[:, -1:].argmax(dim=-1)], dim=1)
    return found


def test_padding_does_not_move_virtual_tokens(bench) -> None:
    torch.manual_seed(1)
    model = PrefixedModel(copy.deepcopy(bench.base), Fixed(torch.randn(3, 64))).eval()
    ids = torch.randint(4, 60, (1, 6))
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(10) >= 4).long()[None]
    more = {"decoder_input_ids": torch.tensor([[1, 7]])} if bench.encoder_decoder else {}
    alone = model(ids, torch.ones_like(ids), **more).logits[:, -1]
    if not bench.encoder_decoder:  # T5's relative positions see the padding in between
        torch.testing.assert_close(model(padded, mask, **more).logits[:, -1], alone, rtol=1e-4, atol=1e-4)
        kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
        out = model.generate(padded, mask, **kwargs)[:, 10:]
        assert torch.equal(out, model.generate(ids, torch.ones_like(ids), **kwargs)[:, 6:])


# -- L2P


def test_l2p_chooses_the_nearest_keys_and_pulls_them() -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 8)
    pool = PromptPool(torch.randn(6, 2, 5), torch.randn(6, 8), lambda rows: query, chosen=2)
    ids, mask = torch.arange(12).view(3, 4), torch.tensor([[0, 1, 1, 1]] * 3)
    found = pool(ids, mask)
    pool.pull.backward()
    keys, q = pool.keys.detach().double().numpy(), query.double().numpy()
    pull, gradient = 0.0, np.zeros_like(keys)
    for b in range(3):
        near = [float(q[b] @ k / np.linalg.norm(q[b]) / np.linalg.norm(k)) for k in keys]
        chosen = sorted(range(6), key=lambda m: -near[m])[:2]
        torch.testing.assert_close(found[b], torch.cat([pool.prompts[m] for m in chosen]))
        for m in chosen:
            pull += (1 - near[m]) / 3
            norm = np.linalg.norm(keys[m])
            gradient[m] -= (q[b] / np.linalg.norm(q[b]) / norm - near[m] * keys[m] / norm**2) / 3
    assert pool.pull.item() == pytest.approx(pull, rel=1e-5)
    np.testing.assert_allclose(pool.keys.grad, gradient, rtol=1e-4, atol=1e-6)


def test_l2p_queries_the_prompt_alone_and_trains_prompts_and_keys(bench) -> None:
    method = L2P(bench)
    asked = []
    method.model.virtual._query[0] = lambda rows: asked.append(rows) or Features(bench)(rows)
    batch = batch_of(bench)
    loss = method.model(**batch).loss + PULL * method.model.virtual.pull
    assert asked[0] == [row["prompt"] for row in encoded(bench, "first")[:4]], "no answer token"
    loss.backward()
    pool = method.model.virtual
    chosen = (pool.keys.grad.abs().sum(dim=1) > 0).sum()
    assert CHOSEN <= chosen < POOL and bool(pool.prompts.grad.abs().sum() > 0)
    assert all(p.grad is None for p in method.model.base.parameters())
    before = bytes_of(pool.parameters())
    method.learn("first")
    assert all(a != b for a, b in zip(before, bytes_of(pool.parameters()), strict=True))


# -- ProgPrompt


def test_progressive_prompts_stand_newest_first_and_freeze() -> None:
    virtual, prompts = Progressive(), [torch.randn(2, 4) for _ in range(3)]
    for prompt in prompts:
        virtual.grow(prompt.clone())
    ids = torch.zeros(5, 3, dtype=torch.long)
    assert torch.equal(virtual(ids, ids)[4], torch.cat([prompts[2], prompts[1], prompts[0]]))
    assert [p.requires_grad for p in virtual.prompts] == [False, False, True]
    virtual.used = 2
    assert torch.equal(virtual(ids, ids)[0], torch.cat([prompts[1], prompts[0]]))


def test_learning_moves_the_newest_prompt_alone(bench) -> None:
    method = ProgPrompt(bench)
    method.learn("first")
    old = bytes_of(method.virtual.prompts)
    method.learn("second")
    assert bytes_of(method.virtual.prompts)[:1] == old and len(method.virtual.prompts) == 2


def test_with_its_task_known_progprompt_forgets_nothing(bench) -> None:
    method = ProgPromptKnown(bench)
    rows = bench.stream["first"]["test"]
    method.learn("first")
    before = method.answers("first", rows)
    method.learn("second")
    assert method.answers("first", rows) == before


# -- LFPT5


def test_lfpt5s_loss_is_the_sum_of_its_three_terms(bench) -> None:
    torch.manual_seed(0)
    method = LFPT5(bench)
    model = method.model
    old = copy.deepcopy(model.virtual)
    old.prompt.data.add_(0.3 * torch.randn_like(old.prompt))
    rows = encoded(bench, "first")
    lm, replayed = batch_of(bench), batch_of(bench, "second")
    batches = {"generator": iter([lm]), "distillation": iter([replayed])}
    found = method.joint(model, old, batches)
    with torch.no_grad():
        new = answer_logits(model, replayed).double().log_softmax(dim=-1)
        was = answer_logits(PrefixedModel(model.base, old), replayed).double().log_softmax(dim=-1)
    kl = float((was.exp() * (was - new)).sum(dim=-1).mean())
    expected = method.weights.generator * float(model(**lm).loss) + method.weights.distillation * kl
    assert kl > 1e-4 and float(found) == pytest.approx(expected, rel=1e-4)
    assert float(distillation(model, copy.deepcopy(model.virtual), replayed)) == pytest.approx(0, abs=1e-6)
    found.backward()
    assert bool(model.virtual.prompt.grad.abs().sum() > 0) and old.prompt.grad is None
    generated = method.generator_row(rows[0])
    assert generated == {"prompt": method.start_ids, "answer": rows[0]["prompt"] + rows[0]["answer"]}


def test_the_distilled_tokens_are_the_answers(bench) -> None:
    method, batch = LFPT5(bench), batch_of(bench)
    count = sum(len(row["answer"]) for row in encoded(bench, "first")[:4])
    logits = answer_logits(method.model, batch)
    tokens = torch.cat([torch.tensor(row["answer"]) for row in encoded(bench, "first")[:4]])
    assert len(logits) == count
    loss = torch.nn.functional.cross_entropy(logits, tokens)
    torch.testing.assert_close(loss, method.model(**batch).loss, rtol=1e-4, atol=1e-4)


def test_generated_texts_are_rows_only_if_they_are_whole(bench) -> None:
    bench.style.tail = "w5"
    method, end = LFPT5(bench), bench.tokenizer.eos_token_id
    assert method.parsed([10, 11, 5, 12, end, 1]) == {"prompt": [10, 11, 5], "answer": [12, end]}
    assert method.parsed([10, 5, 11, 5, 12, end]) == {"prompt": [10, 5, 11, 5], "answer": [12, end]}
    for broken in ([10, 11, 5, 12], [10, 11, 12, end], [10, 11, 5, end], [5, 12, end], [end]):
        assert method.parsed(broken) is None, broken


def test_lfpt5_trains_on_what_it_generates(bench, monkeypatch) -> None:
    pseudo = encoded(bench, "second")[:3]
    monkeypatch.setattr(LFPT5, "draw", lambda self, count: pseudo[:count])
    seen, train = [], LFPT5.train

    def spying(self, name, rows, penalty):
        seen.append(rows)
        train(self, name, rows=rows, penalty=penalty)

    monkeypatch.setattr(LFPT5, "train", spying)
    method = LFPT5(bench)
    for name in bench.stream:
        method.learn(name)
    assert seen == [encoded(bench, "first"), encoded(bench, "second") + pseudo]
    assert method.extra_results()["baseline"]["generated_rows"] == [0, 3] and method.wanted == 40


def test_lfpt5_draws_without_its_rows(bench) -> None:
    bench.style.max_tokens, bench.budget.draw_batch = 4, 8
    assert len(LFPT5(bench).draw(4, rounds=1)) <= 4
    assert lfpt5.SHARE == replay.SHARE == 0.02


# -- EPI


def test_epis_distances_are_mahalanobis() -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.normal(i, 1 + i, size=(30 + i, 5)) for i in range(3)]
    statistics = Statistics()
    for rows in tasks:
        statistics.add(torch.tensor(rows))
    weighted = sum(len(rows) * np.cov(rows, rowvar=False, bias=True) for rows in tasks) / sum(map(len, tasks))
    covariance = (1 - SHRINKAGE) * weighted + SHRINKAGE * np.trace(weighted) / 5 * np.eye(5)
    query = rng.normal(size=(4, 5))
    expected = [[(x - rows.mean(0)) @ np.linalg.solve(covariance, x - rows.mean(0)) for rows in tasks] for x in query]
    np.testing.assert_allclose(statistics.distances(torch.tensor(query)), expected, rtol=1e-9)


def test_epi_answers_with_the_nearest_tasks_adapter(bench) -> None:
    method, known = EPI(bench), PerTask(bench)
    for name in bench.stream:
        method.learn(name)
        known.learn(name)
    rows = [row for name in bench.stream for row in bench.stream[name]["test"]]
    named = [known.answers(name, [row])[0] for name in bench.stream for row in bench.stream[name]["test"]]
    assert method.answers("first", rows) == named, "both tasks' words differ, so that every prompt finds its own"
    assert method.led["first"] == 50.0


def test_epi_reports_its_routing(bench) -> None:
    found = learn_stream(EPI(bench))
    assert found["routing"] == [100.0, 100.0] and "single" not in found
    assert found["stored_bytes"][1] > found["stored_bytes"][0]


def test_features_are_of_the_base_alone_and_of_each_prompt_alone(bench) -> None:
    features = Features(bench)
    prompts = [[10, 11, 12], [20, 21], [10, 11, 12]]
    found = features(prompts)
    body = bench.base.get_encoder() if bench.encoder_decoder else bench.base.get_decoder()
    with torch.no_grad():
        expected = body(input_ids=torch.tensor([[20, 21]])).last_hidden_state.mean(dim=1)[0]
    torch.testing.assert_close(found[1], expected)
    assert torch.equal(found[0], found[2]) and len(features.known) == 2 and not list(features.parameters())
