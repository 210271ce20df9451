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
from planner.kernels.triton.tiles import TARGETS

CPU = torch.device("cpu")


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request, monkeypatch):
    """A device that is taken for a GPU of some target."""
    monkeypatch.setattr(choice, "target_of_device", lambda _: TARGETS[request.param])
    device = torch.device("cuda", int(request.param[3:]))
    yield device
    for rule in (product_is_faster, mlp_is_faster, attention_is_faster):
        rule.cache_clear()


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
def test_a_fixed_plan_s_wide_products_stay_with_cublas(gpu, rows):
    """One run of features is one product, and nobody beats the roofline."""
    assert not product_is_faster(gpu, rows, 3072, 4096, 1, 2)


def test_many_short_runs_are_one_launch_of_triton(gpu):
    assert product_is_faster(gpu, 1, 3072, 4096, 20, 2)
    assert product_is_faster(gpu, 640, 3072, 4096, 40, 2)


def test_an_mlp_of_few_rows_saves_its_round_trips(gpu):
    assert mlp_is_faster(gpu, 1, 4096, 8192, True, 1, 2)
    assert not mlp_is_faster(gpu, 5120, 4096, 8192, True, 1, 2)


def test_a_single_token_s_keys_are_split_where_heads_are_few(gpu):
    assert attention_is_faster(gpu, 1, 32, 8, 1, 16384, 128, 2)
    assert not attention_is_faster(gpu, 64, 32, 32, 1, 1024, 128, 2)
    assert not attention_is_faster(gpu, 1, 32, 8, 640, 640, 128, 2)
