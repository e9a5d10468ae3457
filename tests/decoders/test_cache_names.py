"""transformers 5.24 calls the cache `cache`; before, it was `past_key_values`."""

from __future__ import annotations

import pytest
from transformers import DynamicCache

import variator_kernels as vk
from tests.decoders import tiny
from variator_kernels.sites.attention_refusals import CACHE


@pytest.mark.parametrize("name", CACHE)
def test_either_name_is_read(name):
    decoder = vk.patch(tiny.model("llama"), {"attention_kv": 2}).base_model
    cache = DynamicCache()
    assert decoder._given_cache((), {name: cache}) is cache
    assert decoder._given_cache((), {}) is None


def test_another_name_is_refused_and_not_passed_by():
    """As the next renaming would be."""
    model = vk.patch(tiny.model("llama"), {"attention_kv": 2})
    decoder = model.base_model
    others = {k: v for k, v in decoder.variator_positions.items() if k not in CACHE}
    decoder.__class__ = type("Renamed", (type(decoder),), {"variator_positions": others})
    with pytest.raises(ValueError, match="must take its cache as one of"):
        model(tiny.ids(1, 8))
    with vk.use_ratio(model, 1):
        model(tiny.ids(1, 8))
