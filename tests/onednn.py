"""Products the other way (in float32 oneDNN) whatever was measured, and of small weights too."""

from contextlib import contextmanager
from unittest import mock

from planner.kernels.ops import kept_linear, product_probe


@contextmanager
def by_onednn_everywhere(smallest=1):
    """A context in which weights of so many elements multiply the other way where they can."""

    def always(threads, dtype):
        return (True,) * 4

    with (
        mock.patch.multiple(kept_linear, SMALL=smallest, other_is_faster=always),
        mock.patch.object(product_probe, "other_is_faster", always),
    ):
        yield
