"""The model card: what it says is in the pool, its lines load it, and nobody's own words are lost or believed."""

from __future__ import annotations

import re
import struct
import sys
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model

from helpers.committed import committed_pool
from helpers.tiny import build_pool, grow, padded, tiny_llama, token_rows
from peft_sapt import SaptConfig, accept, save_pool
from peft_sapt.errors import OtherBaseError, SaptError, TaskError
from peft_sapt.hub.card import BEGIN, END, refresh_card, write_card


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def cells_of(card: str) -> list[list[str]]:
    table = card.split("## Tasks")[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_task_has_a_line_with_what_is_known(tmp_path) -> None:
    model = committed_pool()
    model.record_task("a", rows=96, score=71.04, metric="exact match, %", data="ag_news", license="MIT")
    model.record_task("a", rows=97)  # the rest stays
    model.save_pretrained(tmp_path)
    head, _, *lines = cells_of(card_of(tmp_path))
    assert [line[0] for line in lines] == [f"<code>{name}</code>" for name in "abc"]
    first = dict(zip(head, lines[0], strict=True))
    assert first["training rows"] == "97" and first["score"] == "71.0 exact match, %"
    assert first["data"] == "ag_news" and first["licence"] == "MIT"
    assert first["rank"] == "3" and first["stored rows"] == "4"
    own = model.attention_weights(**padded(token_rows([4, 5, 6, 7], seed=0)))[:, 0].mean()
    assert float(first["own weight"]) == pytest.approx(float(own), abs=0.006)
    assert "state" not in head, "nothing to say of a pool whose tasks are all committed"
    model.add_task("d")
    model.save_pretrained(tmp_path)
    assert cells_of(card_of(tmp_path))[-1][-1] == "open"


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_the_picture_shows_the_attention_of_stored_prompts(tmp_path, router: str) -> None:
    model = committed_pool(router)
    model.save_pretrained(tmp_path)
    assert "](attention.png)" in card_of(tmp_path)
    data = (tmp_path / "attention.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 300 and height > 300
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert (again / "attention.png").read_bytes() == data, "an unchanged picture would be pushed anew"


def test_the_attention_of_the_manifest_is_that_of_the_model(tmp_path) -> None:
    from peft_sapt.storage.manifest import manifest_of

    model = committed_pool()
    model.save_pretrained(tmp_path)
    found = torch.tensor(manifest_of(tmp_path / "adapter_model.safetensors")["attention"])
    for seed in range(3):
        weights = model.attention_weights(**padded(token_rows([4, 5, 6, 7], seed=seed))).mean(dim=0)
        torch.testing.assert_close(found[seed], weights, atol=1e-4, rtol=0)


def test_a_closed_form_pool_shows_the_attention_of_its_means(tmp_path) -> None:
    from peft_sapt.storage.manifest import manifest_of

    model = committed_pool("ridge")
    model.save_pretrained(tmp_path)
    found = torch.tensor(manifest_of(tmp_path / "adapter_model.safetensors")["attention"])
    attention = model.base_model.router
    means, solved = attention.means("default").double(), attention.sapt_solved["default"].weight.double()
    expected = (means @ solved.T / attention.temperature("default")).softmax(dim=-1).float()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "loader"), [("llama", "CausalLM"), ("t5", "Seq2SeqLM")])
def test_its_three_lines_load_the_pool(tmp_path, family: str, loader: str, monkeypatch) -> None:
    model = build_pool(family, ["a", "b"])
    model.unload().save_pretrained(tmp_path / "org" / "base")
    model = build_pool(family, ["a", "b"])
    model.base_model.model.config._name_or_path = model.base_model.model.name_or_path = "org/base"
    model.save_pretrained(tmp_path / "pool")
    lines = re.search(r"```python\n(.*?)```", card_of(tmp_path / "pool"), flags=re.S).group(1)
    assert len(lines.strip().splitlines()) == 3 and loader in lines
    names: dict = {}
    monkeypatch.chdir(tmp_path)  # where org/base is found, as it would be on the Hub
    exec(lines.replace("path/or/hub-id-of-this-folder", str(tmp_path / "pool")), names)
    assert names["model"].tasks == ["a", "b"]
    batch = padded(token_rows([5]))
    batch |= {"decoder_input_ids": torch.tensor([[1]])} if family == "t5" else {}
    torch.testing.assert_close(names["model"].eval()(**batch).logits, model.eval()(**batch).logits)


def test_without_a_named_base_the_lines_take_one(tmp_path) -> None:
    model = build_pool("llama", ["a", "b"])
    model.save_pretrained(tmp_path)
    lines = re.search(r"```python\n(.*?)```", card_of(tmp_path), flags=re.S).group(1)
    base = build_pool("llama", ["a", "b"]).unload()
    names: dict = {"base": base}
    exec(lines.replace("path/or/hub-id-of-this-folder", str(tmp_path)), names)
    assert names["model"].tasks == ["a", "b"]


def test_front_matter_for_the_hub(tmp_path) -> None:
    model = build_pool("llama", ["a", "b"])
    model.base_model.model.config._name_or_path = "org/base"
    model.base_model.model.name_or_path = "org/base"
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert {"peft", "sapt", "continual-learning", "base_model:adapter:org/base"} <= set(data.tags)
    assert data.library_name == "peft" and data.base_model == "org/base" and data.pipeline_tag == "text-generation"


def test_a_local_base_is_not_named_to_the_hub(tmp_path) -> None:
    """The Hub refuses a card whose base model is a path."""
    model = build_pool("llama", ["a", "b"])
    model.base_model.model.config._name_or_path = model.base_model.model.name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "pool")
    data = ModelCard.load(tmp_path / "pool" / "README.md").data
    assert data.base_model is None and str(tmp_path) not in card_of(tmp_path / "pool")
    assert f"local model <code>{tmp_path.name}</code>" in card_of(tmp_path / "pool")


def test_a_users_words_and_metadata_stay(tmp_path) -> None:
    model = build_pool("llama", ["a", "b"])
    model.save_pretrained(tmp_path)
    own = card_of(tmp_path).replace(BEGIN, "Trained on a bus.\n\n" + BEGIN).replace(END, END + "\n\nThank you.")
    (tmp_path / "README.md").write_text(own.replace("---\n", "---\nlicense: mit\n", 1), encoding="utf-8")
    grow(model, "next")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.text.index("Trained on a bus.") < card.text.index(BEGIN) < card.text.index("<code>next</code>")
    assert card.text.rstrip().endswith("Thank you.") and card.text.count(BEGIN) == card.text.count(END) == 1


def test_the_empty_template_goes_and_an_edited_one_stays(tmp_path) -> None:
    template = ModelCard.from_template(ModelCardData()).text
    path, config = tmp_path / "README.md", SaptConfig(tasks=["a"]).to_dict()
    path.write_text("---\n{}\n---\n" + template)
    write_card(tmp_path, config)
    assert "More Information Needed" not in card_of(tmp_path)
    path.write_text("---\n{}\n---\n" + template.replace("## Uses", "## Uses\n\nTelling news apart."))
    write_card(tmp_path, config)
    assert "Telling news apart." in card_of(tmp_path) and "More Information Needed" in card_of(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["x | y", "<script>alert(1)</script>", "[here](http://x)", "`code`", "two\nlines", f"{END} x"],
)
def test_recorded_text_stays_text(tmp_path, text: str) -> None:
    model = build_pool("llama", ["a", "b"])
    model.record_task("a", data=text)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert text not in card or text == "two\nlines"
    assert len({len(line) for line in cells_of(card)}) == 1, "a cell has broken its table"
    assert card.count(END) == 1


def test_records_belong_to_tasks(tmp_path) -> None:
    model = build_pool("llama", ["a", "b", "c"])
    with pytest.raises(TaskError, match="no task 'z'"):
        model.record_task("z", rows=1)
    for wrong in ({"rows": -1}, {"rows": 1.5}, {"score": "high"}, {"score": float("nan")}, {"data": "x" * 201}):
        with pytest.raises(SaptError, match=next(iter(wrong))):
            model.record_task("a", **wrong)
    model.record_task("b", rows=3)
    model.remove_task("b")
    assert model.peft_config["default"].records == {}
    with pytest.raises(SaptError, match="records"):
        SaptConfig(tasks=["a"], records=[1])


def test_what_is_stored_of_the_data_is_disclosed(tmp_path) -> None:
    model = committed_pool()
    for name, kind in (("a", "pseudo-samples"), ("b", "real rows")):
        model.record_task(name, replay=kind)
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "a.jsonl").write_text("{}\n")
    model.save_pretrained(tmp_path)
    data = card_of(tmp_path).split("## Data")[1]
    assert re.search(r"made up: <code>a</code> \(4\)", data) and re.search(r"real prompts.*<code>b</code> \(4\)", data)
    assert "`replay/` holds the text" in data and "No licence of the data was recorded" in data


def test_no_picture_is_left_that_shows_another_state(tmp_path) -> None:
    model = committed_pool()
    model.save_pretrained(tmp_path)
    model.remove_task("c")
    model.remove_task("b")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "attention.png").exists() and "attention.png" not in card_of(tmp_path)


def test_without_matplotlib_the_card_has_no_picture(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("peft_sapt.hub.card.can_draw", lambda: False)
    committed_pool().save_pretrained(tmp_path)
    assert "attention.png" not in card_of(tmp_path) and "own weight" in card_of(tmp_path)


def test_other_methods_of_peft_keep_their_card(tmp_path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    before = card_of(tmp_path)
    refresh_card(tmp_path)
    assert card_of(tmp_path) == before and BEGIN not in before


# --- the base model's fingerprint -----------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_refused(tmp_path) -> None:
    build_pool("llama", ["a", "b"]).save_pretrained(tmp_path)
    with pytest.raises(OtherBaseError, match="other values"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with accept("other_base"):
        assert PeftModel.from_pretrained(tiny_llama(), tmp_path).tasks == ["a", "b"]
    with pytest.raises(SaptError, match="other_base"), accept("everything"):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_the_same_base_in_another_number_type_is_the_same(tmp_path, dtype, saved) -> None:
    model = build_pool("llama", ["a", "b"])
    base = build_pool("llama", ["a", "b"]).unload()
    model.base_model.model.to(saved)
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(base.to(saved).to(dtype), tmp_path).tasks == ["a", "b"]


def test_a_slightly_trained_base_is_another(tmp_path) -> None:
    build_pool("llama", ["a", "b"]).save_pretrained(tmp_path)
    base = build_pool("llama", ["a", "b"]).unload()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    with pytest.raises(OtherBaseError):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_longer_vocabulary_is_the_same_base(tmp_path) -> None:
    build_pool("llama", ["a", "b"]).save_pretrained(tmp_path)
    base = build_pool("llama", ["a", "b"]).unload()
    base.resize_token_embeddings(120, mean_resizing=False)
    assert PeftModel.from_pretrained(base, tmp_path).tasks == ["a", "b"]


def test_no_path_leaks_from_a_named_adapter_or_a_relative_base(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients" / "acme").mkdir(parents=True)
    for path in (str(tmp_path / "clients" / "acme"), "clients/acme"):
        model = build_pool("llama", ["a", "b"])
        model.add_adapter("mine", model.peft_config["default"])
        base = model.base_model.model
        base.config._name_or_path = base.name_or_path = path
        for save in (model.save_pretrained, partial(save_pool, model)):
            model.set_adapter("mine")
            folder = tmp_path / f"pool-{len(list(tmp_path.iterdir()))}"
            save(folder)
            refresh_card(folder)
            for card in folder.rglob("README.md"):
                text = card.read_text()
                assert "clients/acme" not in text and str(tmp_path) not in text, card
            monkeypatch.chdir(folder)  # where the path leads nowhere
            refresh_card(".")
            assert not (folder / "README.md").is_file() or "clients/acme" not in card_of(folder)
            monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("names", [["x${y$", "b"], ["$%$", "a$b$"]])
def test_odd_names_are_drawn(tmp_path, names: list[str]) -> None:
    model = build_pool("llama", names)
    batches = [padded(token_rows([4, 5, 6, 7]))]
    model.commit_task(inputs=batches, replay=batches)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "attention.png").is_file()


def test_a_base_with_scalars_heads_or_numbers_that_are_none(tmp_path) -> None:
    """Learnable temperatures, and whatever a base may hold, never stand in the way of its own pool."""
    model = build_pool("llama", ["a", "b"])
    base = model.base_model.model
    base.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
    with torch.no_grad():
        base.model.norm.weight[0] = torch.nan
        base.lm_head.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(model.unload(), tmp_path).tasks == ["a", "b"]


def test_a_vocabulary_that_grew_before_the_pool_was_made(tmp_path) -> None:
    """PEFT then stores the embeddings in the file; the base as it was downloaded has no such rows."""
    from peft import get_peft_model

    def resized():
        torch.manual_seed(0)
        base = tiny_llama()
        base.resize_token_embeddings(120, mean_resizing=False)
        return base

    base = resized()
    with torch.no_grad():
        base.get_input_embeddings().weight[100:].normal_()  # learned since
    get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", tasks=["a"])).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    assert PeftModel.from_pretrained(resized(), tmp_path).tasks == ["a"]


def test_examples_that_may_be_shown_are(tmp_path) -> None:
    """As the model gets them, and nothing in them can be markup."""
    model = committed_pool()
    model.save_pretrained(tmp_path)
    assert "## Prompts" not in card_of(tmp_path) and "record_task(example=)" in card_of(tmp_path)
    model.record_task("a", example="The <b>soup</b> | was cold.\nOutput:")
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path)
    assert "## Prompts" in text and "as in the examples above" in text
    line = next(line for line in text.splitlines() if line.startswith("- <code>a</code>"))
    assert "soup" in line and "<b>" not in line and "|" not in line and "Output:" in line
