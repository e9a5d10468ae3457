"""A folder of saved plugins."""

import pytest

import variator_kernels as vk
from tests.sites import tiny


@pytest.fixture
def folder(tmp_path):
    vk.save_plugins(tiny.patched(ratio=2), tmp_path / "new" / "plugins")
    return tmp_path / "new" / "plugins"
