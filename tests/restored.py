"""Whether a model is exactly as it was: parameters, hooks, forwards, every attribute."""

from typing import Any

from torch import nn

__all__ = ["same_state", "snapshot"]

State = dict[str, dict[str, Any]]

# Written by stock code as it runs.
_OWN_BUSINESS = ("rope_deltas", "_output_capturing_hooks_installed")


def snapshot(model: nn.Module) -> State:
    """Everything of a model that an executor could leave changed."""
    return {
        path: {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in module.__dict__.items()
            if name not in _OWN_BUSINESS
        }
        for path, module in model.named_modules()
    }


def same_state(before: State, after: State) -> bool:
    """Whether two snapshots of a model agree; fails with the path of what differs."""
    for path, attributes in before.items():
        others = after[path]
        assert attributes.keys() == others.keys(), (path, attributes.keys() ^ others.keys())
        for name, value in attributes.items():
            other = others[name]
            if isinstance(value, dict):
                assert value.keys() == other.keys(), (path, name)
                assert all(value[key] is other[key] for key in value), (path, name)
            else:
                assert value is other or value == other, (path, name)
    return True
