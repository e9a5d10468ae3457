"""A folder with a model and texts for the command line."""

import pytest

from tests.train import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("toy")
    toy.t5(made / "model")
    toy.plain_text(made / "text.txt")
    toy.table(made / "task.tsv")
    return made
