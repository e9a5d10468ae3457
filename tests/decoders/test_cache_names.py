"""transformers 5.24 calls the cache `cache`; before, it was `past_key_values`."""

from __future__ import annotations

import pytest
from transformers import DynamicCache

import variator_kernels as vk
from tests.decoders import tiny
from variator_kernels.sites.decoder import CACHE


@pytest.mark.parametrize("name", CACHE)
def test_either_name_is_read(name):
    decoder = vk.patch(tiny.model("llama"), {"attention_kv": 2}).base_model
    cache = DynamicCache()
    assert decoder._given_cache((), {name: cache}) is cache
    assert decoder._given_cache((), {}) is None
