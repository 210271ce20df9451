"""Products with runs of a weight's features equal one with the features gathered, either way."""

import pytest
import torch
from torch.nn import functional as F

from planner.kernels.ops import product_probe
from planner.models.running import run_products
from planner.models.running.run_products import copying_is_faster, product_of_runs, together

RUNS = [((2, 5),), ((0, 1), (3, 8)), ((1, 2), (4, 5), (7, 11)), ((0, 0),)]


@pytest.fixture(params=[False, True], ids=["run by run", "copied"])
def copies(request, monkeypatch):
    monkeypatch.setattr(run_products, "copying_is_faster", lambda *_: (request.param,) * 4)
    return request.param


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids=["out", "in"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (0,), (7, 5, 2)], ids=str)
def test_runs_multiply_as_gathered_features_do(copies, runs, dim, transposed, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 11, generator=generator).to(dtype)
    weight = weight.t() if transposed else weight
    bias = torch.randn(11, generator=generator).to(dtype)
    kept = torch.cat([torch.arange(*run) for run in runs])
    x = torch.randn(*shape, len(kept) if dim else 11, generator=generator).to(dtype)
    right = F.linear(x, weight[:, kept], bias) if dim else F.linear(x, weight[kept], bias[kept])
    found = product_of_runs(x, weight, bias, dim, runs)
    near = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, right, **near)
    assert found.is_contiguous()


@pytest.mark.parametrize("dim", [0, 1], ids=["out", "in"])
def test_gradients_reach_the_whole_weight(copies, dim):
    weight, bias = torch.randn(6, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    runs, kept = ((0, 2), (4, 5)), [0, 1, 4]
    x = torch.randn(3, 3 if dim else 6, requires_grad=True)
    right = F.linear(x, weight[:, kept], bias) if dim else F.linear(x, weight[kept], bias[kept])
    inputs = [x, weight, bias]
    expected = torch.autograd.grad(right.square().sum(), inputs)
    found = product_of_runs(x, weight, bias, dim, runs).square().sum()
    for mine, theirs in zip(torch.autograd.grad(found, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_copy_is_contiguous_and_one_run_is_a_view():
    weight = torch.randn(6, 8)
    assert together(weight, 1, ((1, 4),)).data_ptr() == weight[:, 1:].data_ptr()
    copy = together(weight, 1, ((0, 2), (5, 8)))
    assert copy.is_contiguous()
    assert torch.equal(copy, weight[:, [0, 1, 5, 6, 7]])


def test_what_is_faster_is_measured_once_for_each_precision_and_side(monkeypatch, tmp_path):
    asked = []

    def ratio(way, usual):
        torch.testing.assert_close(way(), usual(), rtol=0.05, atol=0.5)
        asked.append(len(asked))
        return 0.5 if len(asked) % 4 == 0 else 1.0

    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path))
    monkeypatch.setattr(run_products, "ratio", ratio)
    copying_is_faster.cache_clear()
    questions = [(torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 1)]
    found = [copying_is_faster(1, *question) for question in questions]
    assert found == [(False, False, False, True)] * 3
    copying_is_faster.cache_clear()
    assert [copying_is_faster(1, *question) for question in questions] == found
    assert len(asked) == 12
    assert len(list(tmp_path.glob("products/*.json"))) == 3
    assert copying_is_faster(2, torch.float32, 0) == found[0]
    assert len(asked) == 16
    copying_is_faster.cache_clear()
    product_probe.other_is_faster.cache_clear()
