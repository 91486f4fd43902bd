"""What prompts are told by: each kind against a computation by hand, and a row alone whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LongformerConfig, LongformerModel, OPTConfig, OPTForCausalLM

from helpers.tiny import build_pool, labelled, padded, tiny_llama, tiny_t5, token_rows
from helpers.training import fresh_pool
from helpers.zoo import pool_of
from peft_sapt import SaptConfig
from peft_sapt.errors import OtherShapeError, PoolFormatError, SaptError
from peft_sapt.routing import hidden

ROWS = token_rows([5, 9, 1, 14])
KINDS = ["max", "mean", "both", "hidden"]


def standardised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def by_hand(base: nn.Module, row: list[int], kind: str, layer: int) -> torch.Tensor:
    """The feature of one row, token by token, on the plain base model."""
    embedded = base.get_input_embeddings().weight[torch.tensor(row)].detach()  # [n, d]
    mean, largest = sum(embedded) / len(row), torch.stack([column.max() for column in embedded.T])
    if kind == "max":
        return largest
    if kind == "mean":
        return standardised(mean)
    if kind == "both":
        return torch.cat([standardised(mean), standardised(largest)])
    reader = base.get_encoder() if base.config.is_encoder_decoder else base
    with torch.no_grad():
        states = reader(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[layer][0]
    return standardised(sum(standardised(state) for state in states) / len(row))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_kind_is_what_it_says(family: str, kind: str) -> None:
    pool = build_pool(family, ["a", "b", "c"], features=kind, **({"features_layer": 1} if kind == "hidden" else {}))
    found = pool.pooled_prompts([padded(ROWS)])
    base = pool.eval().unload()
    expected = torch.stack([by_hand(base, row, kind, 1) for row in ROWS])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


FAMILIES = [
    "Llama",
    "Mistral",
    "Qwen3",
    "Gemma",
    "GPT-2",
    "OPT",
    "GPT-J",
    "BART",
    "T5",
    "BERT, sequence",
    "RoBERTa, sequence",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_features_of_a_row_alone(name: str) -> None:
    """Padding, batch mates, packing of the batch into parts, and the size of it change nothing."""
    pool = pool_of(name, features="hidden")
    rows = token_rows([5, 9, 3, 7])  # as many as one of them has tokens, once padded
    alone = torch.cat([pool.pooled_prompts([{"input_ids": torch.tensor([row])}]) for row in rows])
    assert float(alone.std(dim=0).mean()) > 0.01
    for side in ("left", "right"):
        torch.testing.assert_close(pool.pooled_prompts([padded(rows, side, extra=2)]), alone, atol=1e-4, rtol=1e-3)
    together, hidden.AT_ONCE = hidden.AT_ONCE, 12
    try:
        torch.testing.assert_close(pool.pooled_prompts([padded(rows)]), alone, atol=1e-4, rtol=1e-3)
    finally:
        hidden.AT_ONCE = together


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_have_the_features_of_their_samples(kind: str) -> None:
    pool = build_pool("llama", ["a", "b", "c"], features=kind)
    rows = token_rows([5, 9, 3])
    ids, positions = [token for row in rows for token in row], [place for row in rows for place in range(len(row))]
    flat = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    torch.testing.assert_close(pool.pooled_prompts([flat]), pool.pooled_prompts([padded(rows)]), atol=1e-5, rtol=1e-4)


def test_blocks_never_enter_the_features() -> None:
    """Nor does anything that training adds: a task's features are those of the plain base for good."""
    pool = build_pool("llama", ["a", "b", "c"], features="hidden")
    before = pool.pooled_prompts([padded(ROWS)])
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            if "sapt_A" in name or "sapt_B" in name:
                parameter.normal_()
    assert torch.equal(pool.train().pooled_prompts([padded(ROWS)]), before)
    assert pool.training and all(m.training for m in pool.modules())


def test_training_reads_a_prompt_once(monkeypatch) -> None:
    runs, run_layers = [], hidden.run_layers
    monkeypatch.setattr(hidden, "run_layers", lambda *args: (runs.append(len(args[3])), run_layers(*args))[1])
    pool = build_pool("llama", ["a", "b", "c"], features="hidden").train()
    rows = token_rows([5, 9, 7, 14])
    batch = labelled("llama", rows[:3])
    first = pool(**batch).loss
    assert runs == [3]
    assert torch.equal(pool(**batch).loss, first) and runs == [3]
    pool(**labelled("llama", [rows[1], rows[3]]))
    assert runs == [3, 1], "one of the two is new"
    for weight in (pool.get_base_model().get_input_embeddings().weight, pool.get_base_model().model.norm.weight):
        with torch.no_grad():
            weight.mul_(1.5)
        pool(**batch)
    assert runs == [3, 1, 3, 3], "other weights, other features"
    pool.eval()(**batch)
    assert runs == [3, 1, 3, 3, 3], "an answer is never taken from what was known"


def test_an_answer_costs_one_partial_forward(monkeypatch) -> None:
    runs, run_layers = [], hidden.run_layers
    monkeypatch.setattr(hidden, "run_layers", lambda *args: (runs.append(len(args[3])), run_layers(*args))[1])
    pool = build_pool("llama", ["a", "b", "c"], features="hidden").eval()
    pool.generate(**padded(ROWS), max_new_tokens=6, do_sample=False, num_beams=3)
    assert runs == [4]


def test_what_depends_on_the_longest_row_runs_alone() -> None:
    """Dynamic rotary positions follow the longest row of a batch: features follow each prompt's own."""
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=16, pad_token_id=1,
                         rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", tasks=["a"], features="hidden"))
    rows = token_rows([10, 60])
    alone = torch.cat([pool.pooled_prompts([padded([row])]) for row in rows])
    torch.testing.assert_close(pool.pooled_prompts([padded(rows)]), alone)


def test_a_base_of_two_dtypes_under_autocast() -> None:
    base = tiny_llama().to(torch.bfloat16)
    for name, module in base.named_modules():
        if "norm" in name:
            module.float()
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b"], features="hidden"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(pool.eval()(**padded(ROWS)).logits.isfinite().all())


def test_rows_of_padding_where_widths_differ() -> None:
    config = OPTConfig(vocab_size=100, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, pad_token_id=1,
                       num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    base = OPTForCausalLM(config)
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b"], init_weights=False)).eval()
    batch = padded(token_rows([5, 4]))
    batch["attention_mask"][0] = 0
    weights = pool.attention_weights(**batch)
    assert torch.equal(weights[0], torch.tensor([0.5, 0.5])) and bool(pool(**batch).logits.isfinite().all())


def test_a_model_that_pads_its_rows_is_found_out_when_the_pool_is_built() -> None:
    torch.manual_seed(0)
    base = LongformerModel(LongformerConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                            intermediate_size=48, attention_window=8, pad_token_id=1))  # fmt: skip
    pool = get_peft_model(base, SaptConfig(tasks=["a", "b"], target_modules=["query", "value"]))
    assert pool.base_model.pool.config.features == "both"
    assert pool.pooled_prompts([padded(ROWS)]).shape == (4, 64)


class Plain(nn.Module):
    """No transformers model: embeddings, one layer, an output."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.layer = nn.Embedding(100, 32), nn.Linear(32, 32)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embeddings(input_ids))


def test_without_layers_embeddings_tell_prompts_apart() -> None:
    pool = get_peft_model(Plain(), SaptConfig(tasks=["a", "b"], target_modules=["layer"]))
    assert pool.base_model.pool.config.features == "both"
    assert pool.pooled_prompts([padded(ROWS)]).shape == (4, 64)
    with pytest.raises(SaptError, match=r"features='hidden' needs the layers.*Plain.*features='both'"):
        get_peft_model(Plain(), SaptConfig(tasks=["a"], target_modules=["layer"], features="hidden"))


def test_a_config_serves_models_of_other_depth_and_width() -> None:
    config = SaptConfig(task_type="CAUSAL_LM", tasks=["a"])
    for width in (64, 32):
        pool = get_peft_model(tiny_llama(hidden=width), config)
        own = pool.base_model.pool.config
        assert (own.features, own.features_layer, own.feature_dim) == ("hidden", 1, width)
    assert config.features is None


@pytest.mark.parametrize("fields, wanted", [
    ({"features": "median"}, r"SaptConfig\.features must be 'max' or"),
    ({"features": "hidden", "features_layer": 3}, r"features_layer is 3, the base model has layers 1 to 2"),
    ({"features": "hidden", "features_layer": 0}, r"features_layer is 0"),
    ({"features": "mean", "features_layer": 1}, r"features_layer is for features='hidden'"),
    ({"features": "mean", "pool_padding": True}, r"pool_padding.*features='max'"),
])  # fmt: skip
def test_refusals(fields: dict, wanted: str) -> None:
    with pytest.raises(SaptError, match=wanted):
        get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", tasks=["a"], **fields))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_saved_with_its_features(kind: str, router: str, tmp_path) -> None:
    pool = build_pool("llama", ["a", "b", "c"], features=kind, router=router).eval()
    expected = pool.attention_weights(**padded(ROWS))
    pool.save_pretrained(tmp_path)
    base = pool.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded.attention_weights(**padded(ROWS)), expected)
    loaded.unload()
    with pytest.raises(SaptError, match="saved with"):
        PeftModel.from_pretrained(base, tmp_path, features="max" if kind != "max" else "mean")
    with pytest.raises((OtherShapeError, PoolFormatError)):
        PeftModel.from_pretrained(tiny_llama(hidden=32), tmp_path)


def test_the_default_is_hidden_for_both_kinds_of_models() -> None:
    for base, task_type in ((tiny_llama(), "CAUSAL_LM"), (tiny_t5(), "SEQ_2_SEQ_LM")):
        pool = get_peft_model(base, SaptConfig(task_type=task_type))
        assert pool.base_model.pool.config.features == "hidden"
    assert fresh_pool().base_model.pool.config.features == "hidden"


def test_far_larger_states_of_one_token_do_not_drown_the_others() -> None:
    states = torch.randn(1, 6, 32)
    mask = torch.ones(1, 6, dtype=torch.bool)
    plain = hidden.mean_state(states, mask)
    states[0, 0] *= 1000  # as the first token's are, in most models
    torch.testing.assert_close(hidden.mean_state(states, mask), plain, atol=1e-3, rtol=1e-2)
    assert float(F.cosine_similarity(states.mean(dim=1), plain).abs()) < 0.9
