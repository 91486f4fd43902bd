"""Where streams come from: benchmarks by name, folders, datasets, Python objects; what is missing is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from peft_sapt.continual.benchmarks import BENCHMARKS, is_task, tasks_in_order
from peft_sapt.continual.options import Data
from peft_sapt.continual.settings import load_stream
from peft_sapt.continual.streams import SPLITS, fingerprint, from_splits, load_dataset_stream, load_folder
from peft_sapt.errors import StreamError

ROW = {"instruction": "Say it.", "input": "it", "output": "yes"}


def write_tasks(folder: Path, names: list[str], rows: int = 3, packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for split in SPLITS:
            text = "".join(json.dumps({**ROW, "input": f"{name} {split} {i}"}) + "\n" for i in range(rows))
            path = folder / f"{name}.{split}.jsonl{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return folder


@pytest.mark.parametrize("name", BENCHMARKS)
def test_orders_are_of_the_same_fifteen_tasks(name: str) -> None:
    first, second = BENCHMARKS[name].orders.values()
    assert len(first) == len(set(first)) == 15 and set(first) == set(second) and first != second


def test_a_benchmarks_tasks_are_found_by_name_or_number() -> None:
    assert is_task("task002_quoref_answer_generation", "002") and is_task("task2_x", "002") and is_task("cb", "cb")
    assert not is_task("task0020_x", "002") and not is_task("task1002_x", "002") and not is_task("cbx", "cb")
    there = ["task363_sst2", "task1290_xsum", "other"]
    order = BENCHMARKS["superni"].orders["order1"]
    assert tasks_in_order(order, there, skip_missing=True) == ["task363_sst2", "task1290_xsum"]
    with pytest.raises(StreamError, match=r"15 tasks 13 are missing: \['1572', '181'.*--missing skip"):
        tasks_in_order(order, there)
    with pytest.raises(StreamError, match="None of the benchmark's tasks"):
        tasks_in_order(order, ["a"], skip_missing=True)


def test_a_named_order_loads_from_a_folder(tmp_path) -> None:
    folder = write_tasks(tmp_path, ["agnews", "amazon", "cb", "mine"], packed=True)
    data = Data(tasks_dir=folder, benchmark="long_sequence", missing="skip", rows=2, split_rows=1)
    stream = load_stream(data, "order3")
    assert list(stream) == ["cb", "amazon", "agnews"]
    assert [len(stream["cb"][split]) for split in SPLITS] == [2, 1, 1]
    data.missing = "error"
    with pytest.raises(StreamError, match="12 are missing"):
        load_stream(data, "order4")


def test_folder_dataset_and_objects_give_the_same_stream(tmp_path) -> None:
    folder = write_tasks(tmp_path / "jsonl", ["first", "second"])
    known = load_folder(folder)
    columns = {"question": "input", "answers": "output", "task": "instruction"}

    def dataset(rows: list[dict]) -> Dataset:
        return Dataset.from_list([{new: row[old] for new, old in columns.items()} for row in rows])

    objects = {name: DatasetDict({s: dataset(rows) for s, rows in of.items()}) for name, of in known.items()}
    stream = from_splits(objects, instruction="task", input="question", output="answers")
    assert stream == known and fingerprint(stream) == fingerprint(known)
    assert known["first"]["train"][0]["output"] == ["yes"], "a text is a list of one reference"

    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}.{split}.jsonl\n" for split in SPLITS)
        for name in known
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load_dataset_stream(str(folder), ["second", "first"]) == {n: known[n] for n in ("second", "first")}
    assert list(load_dataset_stream(str(folder))) == ["first", "second"]
    with pytest.raises(StreamError, match=r"no configuration \['third'\]: it has \['first', 'second'\]"):
        load_dataset_stream(str(folder), ["third"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"first.train.jsonl:2 is not JSON"),
        ('{"input": "x"}', r'first.train.jsonl:2 lacks "input" or "output"'),
        ('{"input": "x", "output": []}', r'first.train.jsonl:2 lacks "input" or "output"'),
        ("[1]", r'first.train.jsonl:2 lacks "input" or "output"'),
    ],
)
def test_a_malformed_row_is_named(tmp_path, line: str, message: str) -> None:
    folder = write_tasks(tmp_path, ["first"])
    (folder / "first.train.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(StreamError, match=message):
        load_folder(folder)


def test_what_is_missing_is_named(tmp_path) -> None:
    folder = write_tasks(tmp_path / "tasks", ["first"])
    with pytest.raises(StreamError, match=r"lacks \['second.train'.*tasks there: \['first'\]"):
        load_folder(folder, ["first", "second"])
    with pytest.raises(StreamError, match="There is no folder"):
        load_folder(tmp_path / "nowhere")
    (folder / "first.test.jsonl").write_text("\n")
    with pytest.raises(StreamError, match=r"first\.test\.jsonl holds no row"):
        load_folder(folder)
    (folder / "first.test.jsonl.gz").write_bytes(b"not packed")
    (folder / "first.test.jsonl").unlink()
    with pytest.raises(StreamError, match=r"first.test.jsonl.gz cannot be read"):
        load_folder(folder)
    with pytest.raises(StreamError, match=r"no split \['test'\]"):
        from_splits({"a": {"train": [ROW], "validation": [ROW]}})
    with pytest.raises(StreamError, match=r"a.train\[1\] lacks"):
        from_splits({"a": {"train": [ROW, {"input": "x"}], "validation": [ROW], "test": [ROW]}})
    with pytest.raises(StreamError, match="No tasks: give --tasks-dir"):
        load_stream(Data())


def test_a_label_of_zero_is_an_answer(tmp_path) -> None:
    rows = [{"text": "x", "label": 0}]
    stream = from_splits({"a": dict.fromkeys(SPLITS, rows)}, input="text", output="label")
    assert stream["a"]["train"][0]["output"] == [0]
    for empty in ("", [], (), {}, None):
        with pytest.raises(StreamError, match='lacks "input" or "output"'):
            from_splits({"a": {split: [{"input": "x", "output": empty}] for split in SPLITS}})
