"""Products by oneDNN whatever this CPU's measurements say, and of small weights too."""

from unittest import mock

from planner.kernels.ops import kept_linear


def by_onednn_everywhere(smallest=1):
    """A context in which weights of so many elements multiply by oneDNN where it can."""
    return mock.patch.multiple(
        kept_linear, SMALL=smallest, fastest=lambda threads: (True,),
        onednn_is_faster=lambda rows: True,
    )  # fmt: skip
