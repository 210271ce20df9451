"""Changes to objects that are undone exactly."""

from __future__ import annotations

from typing import Any, Self

_ABSENT = object()


class Shadow:
    """What stands in for a module's ``forward``, which is called `stock` then.

    Attributes:
        narrows: whether it leaves something out; else it is but another way to compute the same.
    """

    narrows = True
    stock: Any = None


class Patches:
    """Instance attributes set for a while.

    Only an object's own ``__dict__`` is written, so a method shadowed by a patch is the class's own
    again afterwards, and parameters, submodules and hooks are never touched.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Shadow or replace an instance attribute."""
        attributes = target.__dict__
        self._saved.append((attributes, name, attributes.get(name, _ABSENT)))
        attributes[name] = value

    def shadow(self, module: Any, forward: Shadow) -> None:
        """Put something in the place of a module's ``forward`` as it is now."""
        forward.stock = module.forward
        self.set(module, "forward", forward)

    def undo(self) -> None:
        """Put everything back, last change first."""
        while self._saved:
            attributes, name, value = self._saved.pop()
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class ConfigView:
    """A module's config with some attributes replaced, the rest read from the original."""

    def __init__(self, config: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, original_config=config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original_config"], name)
