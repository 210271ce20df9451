import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """Random inputs by seed, and memory that nobody wrote reads as NaN."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
