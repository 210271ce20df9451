"""Who computes: what the user says, and what the cost model says on a GPU that is not here."""

import pytest
import torch

from planner.ir.errors import InputError
from planner.kernels import choice
from planner.kernels.choice import (
    Kernels,
    attention_is_faster,
    mlp_is_faster,
    product_is_faster,
    with_triton,
)
from planner.kernels.triton.tiles import TARGETS, Product

CPU = torch.device("cpu")


@pytest.fixture(params=["sm_80", "sm_90"])
def target(request):
    return TARGETS[request.param]


@pytest.fixture
def gpu(target, monkeypatch):
    """A device that is taken for a GPU of some target."""
    monkeypatch.setattr(choice, "target_of_device", lambda _: target)
    yield torch.device("cuda", target.capability)
    attention_is_faster.cache_clear()


def test_choices_are_read():
    assert [Kernels.of(name) for name in ("auto", "triton", Kernels.TORCH)] == [*Kernels]
    for bad in ("cublas", None, 1):
        with pytest.raises(InputError, match="choose from auto, triton, torch"):
            Kernels.of(bad)


def test_triton_that_is_not_there_is_not_chosen(monkeypatch):
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    with pytest.raises(InputError, match="not installed"):
        Kernels.of("triton")
    assert not with_triton(Kernels.AUTO, torch.device("cuda"))


def test_auto_interprets_nothing_on_a_cpu():
    assert not with_triton(Kernels.AUTO, CPU)
    assert with_triton(Kernels.TRITON, CPU)
    assert not with_triton(Kernels.TORCH, torch.device("cuda"))
    assert with_triton(Kernels.AUTO, torch.device("cuda"))


@pytest.mark.parametrize("rows", [1, 640, 5120])
def test_a_fixed_plan_s_wide_products_stay_with_cublas(target, rows):
    """One run of features is one product, and nobody beats the roofline."""
    assert not product_is_faster(Product(rows, 3072, 4096, target), 1)


def test_many_short_runs_are_one_launch_of_triton(target):
    assert product_is_faster(Product(1, 3072, 4096, target), 20)
    assert product_is_faster(Product(640, 3072, 4096, target), 40)


def test_an_mlp_of_few_rows_saves_its_round_trips(target):
    assert mlp_is_faster(Product(1, 8192, 4096, target, parts=2), 1)
    assert not mlp_is_faster(Product(5120, 8192, 4096, target, parts=2), 1)


def test_a_single_token_s_keys_are_split_where_heads_are_few(gpu):
    assert attention_is_faster(gpu, (1, 32, 1, 128), (1, 8, 16384, 128), 2)
    assert not attention_is_faster(gpu, (64, 32, 1, 128), (64, 32, 1024, 128), 2)
    assert not attention_is_faster(gpu, (1, 32, 640, 128), (1, 8, 640, 128), 2)
