"""The split of wikitext2: what plugins are trained on, and what embeddings are measured on."""

import pytest

from bench.quality import tasks, text
from bench.tools import training_text


@pytest.fixture
def data(tmp_path):
    lines = []
    for i in range(25):
        lines += [f" = Article {i} = ", "", f" {'w ' * 30}{i} ", f" short {i} ", " = = Part = = "]
        lines += [f" {'v ' * 24}{i} "]
    for name, part in zip(tasks.PLAIN_TEXT, (lines[:60], lines[60:]), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(["", *part]) + "\n", encoding="utf-8")
    return tmp_path


def test_no_article_is_in_both(data, tmp_path, capsys):
    trained, held_out = text.training(data), text.held_out(data)
    numbers = [{int(line.split()[-1]) for line in lines} for lines in (trained, held_out)]
    assert numbers[1] == {0, 10, 20} and numbers[0] == set(range(25)) - numbers[1]
    assert len(trained) == 3 * 22 and len(held_out) == 2 * 3
    training_text.main(["--data", str(data), str(tmp_path / "train.txt")])
    assert (tmp_path / "train.txt").read_text().splitlines() == trained
    assert "66 paragraphs" in capsys.readouterr().out


def test_a_paragraph_without_an_article_is_refused(data):
    (data / tasks.PLAIN_TEXT[0]).write_text("no title\n")
    with pytest.raises(ValueError, match="must start with a title"):
        text.articles(data)
