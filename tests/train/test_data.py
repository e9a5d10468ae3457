"""Reading data: what comes in, and a clear error for what is wrong with it."""

import builtins
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from tests.train import toy
from variator_kernels.train import data, rows, task
from variator_kernels.train.collate import batches
from variator_kernels.train.stream import Stream


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def values(found):
    return [row.values for row in found]


def test_reads_every_format(tmp_path):
    columns = ("sentence", "label")
    expected = [{"sentence": 'a "b', "label": "1"}, {"sentence": "ü", "label": "0"}]
    tsv = written(tmp_path / "a.tsv", '\ufefflabel\tsentence\r\n1\ta "b\r\n\r\n0\tü\r\n')
    lines = '{"sentence": "a \\"b", "label": 1}\n\n{"label": "0", "sentence": "ü", "x": []}\n'
    for source in (tsv, written(tmp_path / "a.jsonl", lines), written(tmp_path / "a.json", lines)):
        assert values(data.read(source, columns)) == expected
    text = written(tmp_path / "a.txt", "\n first \n\nsecond")
    found = data.read(text, ("text",))
    assert values(found) == [{"text": "first"}, {"text": "second"}]
    assert found[0].place == f"{text}:2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\n", "is empty"),
        ("a.tsv", "", "is empty"),
        ("a.tsv", "sentence\tlabel\n", "is empty"),
        ("a.jsonl", "\n", "is empty"),
        ("a.tsv", "text\tlabel\nx\t1\n", r"no column 'sentence', its columns are \['text', 'label"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\n", "a.tsv:3 must have 2 columns .* got 1"),
        ("a.jsonl", '{"label": 1}\n', "a.jsonl:1 has no column 'sentence'"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n{x\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1 must hold an object, got list"),
        (
            "a.jsonl",
            '{"sentence": null, "label": 1}\n',
            "a.jsonl:1 must have a value in .*sentence",
        ),
        ("a.csv", "sentence,label\n", "must be a .txt, .tsv, .jsonl or .json file, got .*a.csv"),
    ],
)
def test_refuses_bad_files(tmp_path, name, text, message):
    columns = ("text",) if name.endswith("txt") else ("sentence", "label")
    with pytest.raises(ValueError, match=message):
        data.read(written(tmp_path / name, text), columns)


def test_refuses_what_is_not_there_or_not_text(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no .*b\.tsv"):
        data.read(str(tmp_path / "b.tsv"), ("sentence",))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        data.read(str(tmp_path / "c.txt"), ("text",))
    real = builtins.__import__

    def absent(name, *rest, **settings):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **settings)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install datasets"):
        data.read("glue:sst2", ("sentence",))


def test_reads_a_data_set_by_name(monkeypatch):
    class ClassLabel:
        def int2str(self, value):
            return ["no", "yes"][value]

    class Loaded(list):
        column_names = ("sentence", "label")
        features: ClassVar = {"sentence": None, "label": ClassLabel()}

    def load(name, config, split):
        assert (name, config) == ("glue", "sst2")
        rows = {"train": [("a", 1), ("b", 0), ("c", -1)], "none": [("a", None)], "empty": []}
        return Loaded({"sentence": text, "label": label} for text, label in rows[split])

    stub = SimpleNamespace(ClassLabel=ClassLabel, load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    found = data.read("glue:sst2", ("sentence", "label"))
    assert [tuple(row.values.values()) for row in found] == [("a", "yes"), ("b", "no"), ("c", "-1")]
    assert found[1].place == "glue:sst2 row 1"
    for split, message in (("none", "row 0 must have a value in column 'label'"), ("empty", "is")):
        with pytest.raises(ValueError, match=message):
            data.read(f"glue:sst2:{split}", ("sentence", "label"))
    with pytest.raises(ValueError, match="has no column 'text'"):
        data.read("glue:sst2", ("text",))


def test_pieces_keep_all_text(tmp_path):
    words = toy.tokenizer()
    text = toy.sentences(1, 50, 50)[0]
    pieces = rows.paragraphs([data.Row("", {"text": text})], words, 21)
    assert [len(piece["input_ids"]) for piece in pieces] == [21, 21, 11]
    joined = [token for piece in pieces for token in piece["input_ids"][:-1]]
    assert joined == words(text)["input_ids"][:-1]
    assert all(piece["input_ids"][-1] == 1 for piece in pieces)
    with pytest.raises(ValueError, match="no paragraph of at least 8 tokens"):
        rows.paragraphs([data.Row("", {"text": "w1 w2"})], words, 21)
    with pytest.raises(ValueError, match="max_length must be at least 9, got 8"):
        rows.paragraphs([data.Row("", {"text": text})], words, 8)


def test_refuses_texts_longer_than_the_model_takes():
    words = toy.tokenizer()
    read = [data.Row("x.tsv:2", {"a": "w1 w2 w3", "b": "w4"})]
    whole = rows.examples(read, ("a", "b"), words, None, None)[0]["input_ids"]
    assert len(whole) == 6
    with pytest.raises(ValueError, match=r"x.tsv:2 has 6 tokens, the model takes 5"):
        rows.examples(read, ("a", "b"), words, None, 5)
    assert len(rows.examples(read, ("a", "b"), words, 5, 5)[0]["input_ids"]) == 5
    with pytest.raises(ValueError, match="max_length must be at most 5"):
        rows.examples(read, ("a", "b"), words, 6, 5)
    with pytest.raises(ValueError, match=r"x\.tsv:2 has no text"):
        rows.examples([data.Row("x.tsv:2", {"a": " "})], ("a",), words, None, None)


def test_labels_are_names_or_numbers():
    read = [data.Row(f"x:{i}", {"label": value}) for i, value in enumerate(["no", "1", "yes"])]
    assert task.class_ids(read, "label", ["no", "yes"]) == [0, 1, 1]
    with pytest.raises(ValueError, match=r"x:2 has the label 'yes', it must be one of \['no'"):
        task.class_ids(read, "label", ["no", "yep"])


def test_a_stream_repeats_itself_and_deals_every_row_once_a_turn():
    made = [{"input_ids": [0] * (i % 7 + 1)} for i in range(23)]
    for group in (False, True):
        stream = Stream(made, 60, 4, seed=3, group=group)
        assert sorted(stream.order(0)) == sorted(stream.order(1)) == list(range(23))
        assert stream.order(0) != stream.order(1)
        again = Stream(made, 60, 4, seed=3, group=group)
        assert [again[i] for i in (59, 0, 31)] == [stream[i] for i in (59, 0, 31)]
    # Steps of rows alike, also where a step begins in one pass and ends in the next (20, 44).
    steps = [
        [len(stream[i]["input_ids"]) for i in range(start, start + 4)] for start in range(0, 60, 4)
    ]
    mixed = [i for i, size in enumerate(steps) if max(size) - min(size) > 2]
    assert set(mixed) <= {5, 11}


def test_batches_hold_every_row_once():
    assert batches(range(7), list, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches([], list, 3) == []


def test_varied_pieces_keep_all_text_and_repeat_themselves():
    words = toy.tokenizer()
    text = [data.Row("", {"text": line}) for line in toy.sentences(40, 100, 200)]
    pieces = rows.paragraphs(text, words, 33, varied=3)
    assert rows.paragraphs(text, words, 33, varied=3) == pieces
    assert rows.paragraphs(text, words, 33, varied=4) != pieces
    sizes = [len(piece["input_ids"]) for piece in pieces]
    assert min(sizes) >= 9 and max(sizes) <= 33 and len(set(sizes)) > 20
    assert all(piece["input_ids"][-1] == 1 for piece in pieces)
    found = " ".join(words.decode(piece["input_ids"][:-1]) for piece in pieces)
    whole = " ".join(row.values["text"] for row in text)
    assert len(found.split()) > 0.9 * len(whole.split()), "ends below 8 tokens are left out"
    with pytest.raises(ValueError, match="max_length must be at least 9, got 8"):
        rows.paragraphs(text, words, 8, varied=3)
