"""Rows of a module that are not the prompts' rows: no image takes the weights of another row's text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from helpers.tiny import tiny_llama, token_rows
from peft_sapt import SaptConfig
from peft_sapt.errors import WeightsError
from peft_sapt.layer import SaptLayer
from peft_sapt.routing.towers import rows_agree, tower_of

IMAGE, TASKS = 99, ["a", "b", "c"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
TEXT = {
    **SMALL,
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}


def llava() -> tf.PreTrainedModel:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_token_id=IMAGE, vision_feature_layer=-1, pad_token_id=1,
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config)


def clip() -> tf.PreTrainedModel:
    text = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 32, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def pool_on(base: tf.PreTrainedModel, task_type: str | None = "CAUSAL_LM", **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"tasks": TASKS, "init_weights": False, "temperature": 0.3, "token_dim": None, **settings}
    pool = get_peft_model(base.eval(), SaptConfig(task_type=task_type, **settings)).eval()
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            if "query_down" in name:
                parameter.mul_(4)
    return pool


def llava_pool(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    base = llava()
    base.get_input_embeddings().weight.data.normal_()
    return pool_on(base, target_modules=["q_proj", "v_proj", "linear_1"], **settings)


def batch(images_of: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """Rows of equal length, each with so many images of four tokens in front of its text."""
    width = 4 * max(images_of) + 5
    rows = [[IMAGE] * 4 * n + token_rows([width - 4 * n], seed + i)[0] for i, n in enumerate(images_of)]
    ids = torch.tensor(rows)
    ids[(ids == IMAGE) & (torch.arange(width) >= 4 * torch.tensor(images_of).unsqueeze(1))] = 98
    images = torch.randn(sum(images_of), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("images_of", [[2, 0], [1, 2, 0], [2, 1], [3, 0, 0], [2, 2]])
def test_rows_with_several_images_or_none_are_refused(images_of: list[int], router: str) -> None:
    """Even where the count of images happens to be that of the rows."""
    pool, inputs = llava_pool(router=router), batch(images_of)
    with (
        pytest.raises(WeightsError, match=r"vision_tower.*rows are no prompts.*exclude_modules"),
        torch.no_grad(),
    ):
        pool(**inputs)


def test_one_image_a_row_has_the_rows_weights() -> None:
    pool, inputs = llava_pool(), batch([1, 1, 1])
    with torch.no_grad():
        whole = pool(**inputs).logits
        for i in range(3):
            alone = {name: value[i : i + 1] for name, value in inputs.items()}
            torch.testing.assert_close(whole[i : i + 1], pool(**alone).logits, atol=1e-5, rtol=0)
    assert float(pool.attention_weights(inputs["input_ids"]).std(dim=0).max()) > 0.01


@pytest.mark.parametrize("given", [{"sapt_task": "b"}, {"sapt_weights": [0.2, 0.3, 0.5]}])
@pytest.mark.parametrize("images_of", [[2, 0], [1, 2, 0], [3]])
def test_one_mixture_for_all_holds_for_any_images(images_of: list[int], given: dict[str, Any]) -> None:
    """Against a plain LoRA of that mixture, which has no rows of weights at all."""
    pool, inputs = llava_pool(), batch(images_of)
    weights = [0.0, 1.0, 0.0] if "sapt_task" in given else given["sapt_weights"]
    with torch.no_grad():
        found = pool(**inputs, **given).logits
        for layer in pool.modules():
            if isinstance(layer, SaptLayer):
                config = pool.peft_config["default"]
                for i, part in enumerate(layer.parts("sapt_B", "default", layer.part_sizes(config))):
                    part.mul_(weights[i])
        torch.testing.assert_close(found, pool(**inputs, sapt_weights=[1.0, 1.0, 1.0]).logits, atol=1e-5, rtol=0)


def test_a_row_alone_with_its_images_under_checkpointing() -> None:
    pool, inputs = llava_pool().train(), batch([2])
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 10, -100)
    plain = torch.autograd.grad(pool(**inputs, labels=labels).loss, [p for p in pool.parameters() if p.requires_grad])
    pool.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(
        pool(**inputs, labels=labels, use_cache=False).loss, [p for p in pool.parameters() if p.requires_grad]
    )
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_one_image_a_row_under_checkpointing() -> None:
    pool, inputs = llava_pool().train(), batch([1, 1])
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 7, -100)
    pool.gradient_checkpointing_enable({"use_reentrant": False})
    pool(**inputs, labels=labels, use_cache=False).loss.backward()


@pytest.mark.parametrize("texts, images", [(2, 2), (3, 1), (1, 4)])
def test_texts_by_images(texts: int, images: int) -> None:
    pool = pool_on(clip(), None, target_modules=["q_proj", "v_proj"], token_dim=16)
    inputs = {"input_ids": torch.tensor(token_rows([6] * texts)), "pixel_values": torch.randn(images, 3, 8, 8)}
    inputs["input_ids"][:, -1] = 2
    with torch.no_grad():
        if texts > 1:
            with pytest.raises(WeightsError, match=r"vision_model.*rows are no prompts"):
                pool(**inputs, sapt_weights=torch.eye(3)[:texts])
        grid = pool(**inputs, sapt_task="c").logits_per_text
        for t in range(texts):
            for i in range(images):
                pair = {"input_ids": inputs["input_ids"][t : t + 1], "pixel_values": inputs["pixel_values"][i : i + 1]}
                expected = pool(**pair, sapt_task="c").logits_per_text[0, 0]
                torch.testing.assert_close(grid[t, i], expected, atol=1e-5, rtol=1e-5)


def test_without_the_tower_any_images_are_served() -> None:
    pool, inputs = llava_pool(exclude_modules=r".*(vision_tower|multi_modal_projector).*"), batch([2, 0])
    with torch.no_grad():
        found, weights = pool(**inputs).logits, pool.attention_weights(inputs["input_ids"])
        torch.testing.assert_close(found, pool(**inputs, sapt_weights=weights).logits)


def test_what_is_a_tower() -> None:
    names = {name: tower_of(base, name) for base in (llava(), clip(), tiny_llama()) for name, m in base.named_modules()
             if isinstance(m, torch.nn.Linear)}  # fmt: skip
    text = {name for name, tower in names.items() if tower is None}
    assert all(n.startswith(("model.language_model", "lm_head", "text_", "model.layers")) for n in text), text
    assert {tower for tower in names.values() if tower} == {
        "model.vision_tower", "model.multi_modal_projector", "vision_model", "visual_projection",
    }  # fmt: skip


def test_when_rows_agree() -> None:
    base = llava()
    assert rows_agree({"input_ids": torch.ones(2, 3)}, base)
    assert rows_agree(batch([1, 1]), base) and not rows_agree(batch([2, 0]), base)
    crops = batch([1, 1])
    crops["pixel_values"] = crops["pixel_values"].unsqueeze(1)
    assert rows_agree(crops, base)  # one image of one crop
    crops["pixel_values"] = crops["pixel_values"].repeat(1, 2, 1, 1, 1)
    assert not rows_agree(crops, base)
    assert not rows_agree({"input_ids": torch.ones(2, 3), "pixel_values_videos": torch.ones(2, 3, 8, 8)}, base)
    assert rows_agree({"input_ids": torch.ones(2, 3), "pixel_attention_mask": torch.ones(2, 8)}, base)
    assert not rows_agree({"input_ids": torch.ones(2, 3), "pixel_values": torch.ones(2, 3, 8, 8)}, clip())


def git() -> tf.PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return tf.GitForCausalLM(tf.GitConfig(vision_config=vision, **text))


def deepseek() -> tf.PreTrainedModel:
    return tf.DeepseekVLForConditionalGeneration(
        tf.DeepseekVLConfig(
            text_config=tf.LlamaConfig(**TEXT), vision_config=tf.SiglipVisionConfig(**VISION), image_token_id=IMAGE
        )
    )


def blip2() -> tf.PreTrainedModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = tf.OPTConfig(vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                        word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1)  # fmt: skip
    config = tf.Blip2Config(
        vision_config={**shape, "image_size": 8, "patch_size": 4}, text_config=text, num_query_tokens=4,
        qformer_config={**shape, "vocab_size": 100, "encoder_hidden_size": 16}, image_token_index=IMAGE,
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(
    "make, targets", [(deepseek, r"model\.aligner\.linear.*"), (blip2, ["language_projection", "qkv"])]
)
def test_towers_of_other_families(make, targets) -> None:
    """Row 0 has both images, row 1 none."""
    torch.manual_seed(0)
    base = make()
    base.get_input_embeddings().weight.data.normal_()
    pool = pool_on(base, target_modules=targets)
    ids = torch.tensor([[IMAGE] * 8 + [5, 6, 7], [50] * 8 + [8, 9, 10]])
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with pytest.raises(WeightsError, match="rows are no prompts"):
            pool(input_ids=ids, pixel_values=images)
        pool(input_ids=ids, pixel_values=images, sapt_task="a")
        pool(input_ids=ids[:1], pixel_values=images)


def test_one_image_a_row_without_image_tokens() -> None:
    torch.manual_seed(0)
    base = git()
    base.get_input_embeddings().weight.data.normal_()
    pool = pool_on(base, target_modules=["q_proj", "v_proj", "query", "value"])
    ids, images = torch.tensor(token_rows([5, 5])), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        whole = pool(input_ids=ids, pixel_values=images).logits
        for i in range(2):
            alone = pool(input_ids=ids[i : i + 1], pixel_values=images[i : i + 1]).logits
            torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [4, 6])
def test_layers_that_run_on_positions_first(width: int) -> None:
    """XLNet's rows are positions: with as many of these as prompts nothing else would tell."""
    torch.manual_seed(0)
    base = tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=1)
    )
    base.get_input_embeddings().weight.data.normal_()
    pool = pool_on(base, target_modules=["layer_1", "layer_2"])
    ids = torch.tensor(token_rows([width] * 4))
    with torch.no_grad():
        with pytest.raises(WeightsError, match="part of XLNetLMHeadModel"):
            pool(input_ids=ids)
        together = pool(input_ids=ids, sapt_task="b").logits
        alone = torch.cat([pool(input_ids=ids[i : i + 1], sapt_task="b").logits for i in range(4)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        pool(input_ids=ids[:1])
