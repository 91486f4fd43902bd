"""bitsandbytes layers in 4 and 8 bit as base layers, on the CPU."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers.tiny import padded, tiny_llama, token_rows
from peft_sapt import SaptConfig
from peft_sapt.ops import reference

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
ROWS = token_rows([5, 9, 3])


def quantised(bits: int) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if not name.endswith("_proj") or module.in_features % 64:  # bitsandbytes packs whole blocks on some CPUs
            continue
        sizes = module.in_features, module.out_features
        if bits == 4:
            layer = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        else:
            layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        layer.load_state_dict(module.state_dict())
        model.set_submodule(name, layer)
    return model.to("cpu").eval()


def pool_on(base: nn.Module) -> PeftModel:
    torch.manual_seed(1)
    config = SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b", "c"], task_ranks=[2, 3, 4], init_weights=False)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_forward_gradient_and_loading(bits, tmp_path) -> None:
    model = pool_on(quantised(bits))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    seen = {}
    handle = layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    batch = padded(ROWS)
    with torch.no_grad():
        logits = model(**batch).logits
        handle.remove()
        a, b = (layer.parts(name, "default", [2, 3, 4]) for name in ("sapt_A", "sapt_B"))
        parts = (a, [rows.T for rows in b])
        weights, scaling = model.attention_weights(**batch), model.peft_config["default"].scalings
        expected = reference.weighted_lora(seen["x"], layer.base_layer(seen["x"]), *parts, weights, scaling)
    torch.testing.assert_close(seen["out"], expected, atol=1e-4, rtol=1e-4)

    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    trained = pool_on(quantised(bits)).train()  # an answer may pack 4-bit weights so that they have no gradient later
    trained(**batch, labels=labels).loss.backward()
    found = {n for n, p in trained.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert found == {n for n, p in trained.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(bits), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, logits)
        base = pool_on(quantised(bits)).unload().eval()
        torch.testing.assert_close(base(**batch).logits, quantised(bits)(**batch).logits)
