"""What a caller gives holds where no prompt is: generation from a start token, from images, from sound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from helpers.tiny import PAD, VOCAB, build_pool
from peft_sapt import SaptConfig
from peft_sapt.errors import PromptError, TaskError, WeightsError

TASKS = ["a", "b", "c"]
GIVEN = [
    {"sapt_task": "a"},
    {"sapt_task": ["c"]},
    {"sapt_weights": [0.0, 0.0, 1.0]},
    {"sapt_weights": torch.tensor([[0.2, 0.5, 0.3]])},
]
IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 3, "eos_token_id": 2, "decoder_start_token_id": 3}
SIDES = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
         {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip


def whisper() -> tf.PreTrainedModel:
    lengths = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30}
    config = tf.WhisperConfig(**IDS, **SIDES, **lengths, d_model=32, suppress_tokens=None, begin_suppress_tokens=None)
    return tf.WhisperForConditionalGeneration(config)


def speech_to_text() -> tf.PreTrainedModel:
    lengths = {"input_feat_per_channel": 8, "max_source_positions": 40, "max_target_positions": 30}
    return tf.Speech2TextForConditionalGeneration(
        tf.Speech2TextConfig(**IDS, **SIDES, **lengths, d_model=32, conv_channels=16)
    )


def caption() -> tf.PreTrainedModel:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = tf.ViTConfig(**shape, image_size=8, patch_size=4)
    text = tf.BertConfig(**shape, vocab_size=VOCAB, is_decoder=True, add_cross_attention=True, pad_token_id=PAD)
    model = tf.VisionEncoderDecoderModel(tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text))
    for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        setattr(model.generation_config, name, IDS[name])
        setattr(model.config, name, IDS[name])
    return model


MODELS: dict[str, tuple[Any, str, torch.Tensor, list[str]]] = {
    "Whisper": (whisper, "input_features", torch.randn(2, 8, 40), ["q_proj", "v_proj"]),
    "Speech2Text": (speech_to_text, "input_features", torch.randn(2, 40, 8), ["q_proj", "v_proj"]),
    "captions": (caption, "pixel_values", torch.randn(2, 3, 8, 8), ["query", "value", "q_proj", "v_proj"]),
}


def pool_of(name: str) -> PeftModel:
    make, _, _, targets = MODELS[name]
    torch.manual_seed(0)
    settings = {"tasks": TASKS, "init_weights": False, "target_modules": targets, "token_dim": 32}
    return get_peft_model(make().eval(), SaptConfig(**settings)).eval()


def first_logits(pool: PeftModel, *prompt: Any, **given: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return pool.generate(*prompt, **settings, **given).logits[0]


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("block", ["lora", "prompt"])
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_from_the_start_token(given: dict[str, Any], block: str, router: str) -> None:
    pool, start = build_pool("llama", TASKS, block=block, router=router).eval(), torch.tensor([[3]])
    with torch.no_grad():
        expected = pool(start, **given).logits[:, -1]
    torch.testing.assert_close(first_logits(pool, bos_token_id=3, **given), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(first_logits(pool, start, **given), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(first_logits(pool, bos_token_id=3), expected, atol=1e-5)


def test_several_rows_from_the_start_token() -> None:
    pool = build_pool("llama", TASKS).eval()
    found = first_logits(pool, bos_token_id=3, sapt_task="b", num_return_sequences=3, num_beams=3)
    expected = first_logits(pool, bos_token_id=3, sapt_task="b")
    torch.testing.assert_close(found, expected.expand_as(found), atol=1e-6, rtol=0)
    for given, error in (({"sapt_task": "z"}, TaskError), ({"sapt_weights": [1.0]}, WeightsError)):
        with pytest.raises(error):
            first_logits(pool, bos_token_id=3, **given)


@pytest.mark.parametrize(
    "given", [{"sapt_task": "a"}, {"sapt_task": ["a", "c"]}, {"sapt_weights": torch.eye(3)[[2, 1]]}]
)
@pytest.mark.parametrize("name", MODELS)
def test_from_images_or_sound(name: str, given: dict[str, Any]) -> None:
    """By name or first in the call, in one generation and step by step; each row as if it were alone."""
    pool, (_, argument, value, _) = pool_of(name), MODELS[name]
    named = first_logits(pool, **{argument: value}, **given)
    placed = first_logits(pool, value, **given)
    torch.testing.assert_close(placed, named)
    with torch.no_grad():
        expected = pool(**{argument: value}, decoder_input_ids=torch.full((2, 1), 3), **given).logits[:, -1]
    torch.testing.assert_close(named, expected, atol=1e-5, rtol=0)
    for row in range(2):
        own = {k: v if isinstance(v, str) else v[row : row + 1] for k, v in given.items()}
        alone = first_logits(pool, **{argument: value[row : row + 1]}, **own)
        torch.testing.assert_close(named[row : row + 1], alone, atol=1e-5, rtol=0)
    other = first_logits(pool, **{argument: value}, sapt_task="b")
    assert not torch.allclose(other, named, atol=1e-5)
    beams = pool.generate(**{argument: value}, num_beams=2, max_new_tokens=3, do_sample=False, **given)
    assert len(beams) == 2


@pytest.mark.parametrize("name", MODELS)
def test_without_weights_it_is_refused_in_one_line(name: str) -> None:
    pool, (_, argument, value, _) = pool_of(name), MODELS[name]
    for call in (lambda: pool.generate(**{argument: value}), lambda: pool.generate(value)):
        with pytest.raises(PromptError, match=r"Neither input_ids nor inputs_embeds is given.*sapt_task"):
            call()
