import pytest
import torch
from small_llava import write_small_llava

from planner.ir.lowering import lower_model
from planner.loading import load_model


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small gain nothing from threads, which spin when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(a random LLaVA, its processor, its Graph)."""
    folder = write_small_llava(tmp_path_factory.mktemp("base"))
    model, processor, _ = load_model(str(folder))
    return model, processor, lower_model(model, "small")
