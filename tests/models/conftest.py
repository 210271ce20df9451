"""One model and one Graph per family for the session: tests leave models as they were."""

import functools

import pytest
import torch
from families import FAMILIES, Family

from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.running.session import Session

_models = []


@functools.cache
def lowered(name: str) -> tuple[Family, Graph]:
    family = FAMILIES[name]()
    _models.append(family.model)
    return family, lower_model(family.model, name)


@pytest.fixture(autouse=True)
def _no_session_stays():
    yield
    for model in _models:
        session = Session.of(model)
        if session is not None:
            session.close()


@pytest.fixture(params=FAMILIES)
def each_family(request) -> tuple[Family, Graph]:
    return lowered(request.param)


@pytest.fixture
def llava() -> tuple[Family, Graph]:
    return lowered("llava")


@pytest.fixture
def lowered_family():
    return lowered


@pytest.fixture
def qwen3() -> tuple[Family, Graph]:
    return lowered("qwen3")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
