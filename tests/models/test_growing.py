"""The layer that appends in place against the stock one, under everything that is done to it."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from planner.models.running.growing_cache import GrowingLayer

ROWS = 3

steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
    st.tuples(st.just("reorder"), st.permutations(range(ROWS))),
    st.tuples(st.just("copy"), st.none()),
    st.tuples(st.just("inference"), st.integers(1, 5)),
    st.tuples(st.just("reset"), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=12))
def test_it_holds_what_the_stock_layer_holds(taken):
    layers, seen = [GrowingLayer(), DynamicLayer()], []
    for name, value in [("append", 5), *taken, ("append", 2)]:
        if name in ("append", "inference"):
            keys = torch.randn(ROWS, 2, value, 4)
            with torch.inference_mode(name == "inference"):
                found, expected = (layer.update(keys, -keys[..., :3]) for layer in layers)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            seen.append((found[0], found[0].clone()))
        elif name == "crop":
            if layers[0].get_seq_length() > value:
                seen.clear()
                for layer in layers:
                    layer.crop(-value)
        elif name == "reorder":
            for layer in layers:
                if layer.is_initialized:
                    layer.reorder_cache(torch.tensor(value))
        elif name == "copy":
            # What is written to a copy must not be seen in the original.
            other = copy.deepcopy(layers[0])
            if other.is_initialized:
                other.update(torch.ones(ROWS, 2, 1, 4), torch.ones(ROWS, 2, 1, 3))
        else:
            for layer in layers:
                layer.reset()
    assert layers[0].get_seq_length() == layers[1].get_seq_length()
    for tensor, before in seen:
        assert torch.equal(tensor, before), "what was handed out must not change"


def test_a_decoded_token_copies_nothing():
    layer = GrowingLayer()
    keys, _ = layer.update(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4))
    for _ in range(GrowingLayer.ROOM):
        more, _ = layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
        assert more.data_ptr() == keys.data_ptr()
    more, _ = layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    assert more.data_ptr() != keys.data_ptr()


def test_gradients_pass_through():
    layer, keys = GrowingLayer(), torch.randn(1, 2, 3, 4, requires_grad=True)
    layer.update(keys, keys)
    layer.update(keys, keys)[0].sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2))
