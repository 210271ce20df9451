"""What narrowing heads asks of an attention block beyond its weights.

Most attention blocks take the number of heads from the width of what their projections return.
Some also hold it as an integer: GPT-2 splits its fused projection at ``split_size``, Phi-3 at
``config.num_attention_heads * head_dim``. Which integers those are is found by trying: a block is
run on a few tokens, narrowed, and compared with itself with the same heads masked. In the same way
it is found out which arguments have an entry for every head (Bloom's biases by distance), which
parameters beside the linears' (Chameleon's norms, gpt-oss's sinks), and what the block adds to its
result by itself (Bloom's residual).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.ir.intervals import Intervals, count_of
from planner.ir.lowering.example_inputs import decoder_inputs
from planner.models.running.bindings import BoundSite
from planner.models.running.patches import ConfigView, Patches
from planner.models.running.products import KeptProduct, evaluating, is_close

PROBE_TOKENS = 5
# Named arguments of a module's ``forward``; the hidden states are the first.
Given = dict[str, Any]


@dataclass(frozen=True)
class AttentionBlock:
    """What was found out about one attention block."""

    lanes: int  # KV groups of the base model
    # (owner, name, value) of integers that count heads or their features; the owner is ``module``
    # or ``config``.
    integers: tuple[tuple[str, str, int], ...]
    # For each place of the result whether it is the hidden states; None where it is these alone.
    output: tuple[bool, ...] | None
    # (name, dimension, size) of arguments with an entry for every head, by samples.
    arguments: tuple[tuple[str, int, int], ...] = ()
    # (path and name inside the block, dimension, size) of parameters with an entry for every head.
    parameters: tuple[tuple[str, str, int, int], ...] = ()
    # For each place of the result the argument that is handed on there, "" where none is.
    handed_on: tuple[str, ...] = ()
    added: str = ""  # the argument that the block adds to its result, "" where there is none

    def changes(self, kept: int, owner: str) -> dict[str, int]:
        """The integers of one owner with `kept` groups left."""
        return {
            name: value * kept // self.lanes
            for holder, name, value in self.integers
            if holder == owner
        }

    def run(
        self, module: nn.Module, stock: Callable[..., Any], given: Given, kept: Intervals
    ) -> Any:
        """What a block's code makes of its arguments with these groups left."""
        narrowed = dict(given)
        for name, dim, size in self.arguments:
            if isinstance(given.get(name), Tensor):
                narrowed[name] = self._kept(given[name], dim, size, kept)
        with Patches() as patches:
            for path, name, dim, size in self.parameters:
                owner = module.get_submodule(path)
                patches.set(owner, name, self._kept(getattr(owner, name), dim, size, kept))
            output = stock(**narrowed)
        if not isinstance(output, tuple):
            return output
        # What is handed on is for other blocks, whose heads are others.
        whole = {id(narrowed[name]): given[name] for name, _, _ in self.arguments if name in given}
        return tuple(whole.get(id(value), value) for value in output)

    def _kept(self, value: Tensor, dim: int, size: int, kept: Intervals) -> Tensor:
        """A value without the entries of heads that are left out."""
        entries = value.unflatten(dim, (-1, self.lanes, size // self.lanes))
        parts = [entries.narrow(dim + 1, start, stop - start) for start, stop in kept]
        return torch.cat(parts, dim + 1).flatten(dim, dim + 2)


def headless(
    hidden: Tensor,
    bias: Tensor | None,
    output: Sequence[bool] | None,
    added: Tensor | None = None,
) -> Any:
    """A block's result with no head left: its last linear's bias and what it adds by itself.

    It is laid out as `AttentionBlock.output` says.
    """
    result = torch.zeros_like(hidden) if added is None else added
    result = result if bias is None else result + bias.to(hidden.dtype)
    if output is None:
        return result
    return tuple(result if is_hidden else None for is_hidden in output)


class _Reached(Exception):
    """Carries the arguments of a module out of a forward pass that need not go on."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of what the ``forward`` of a class of modules takes."""
    return _names_of(kind.forward)


# Reading a signature takes longer than running a layer.
@lru_cache(maxsize=128)
def _names_of(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> Given:
    """Arguments of a module by name, in the order of its ``forward``."""
    names = names_of(type(module))
    given = dict(zip(names, args)) | kwargs
    return {name: given.pop(name) for name in names if name in given} | given


def arguments_of(decoder: nn.Module, module: nn.Module, width: int) -> Given:
    """How the decoder calls a module of its own, given a few tokens; InputError if it does not."""
    failure = ""
    with module.register_forward_pre_hook(_stop, with_kwargs=True):
        for inputs, _ in decoder_inputs(decoder, width, PROBE_TOKENS, 2 * PROBE_TOKENS):
            try:
                decoder(**_drawn(inputs, next(module.parameters())))
            except _Reached as reached:
                return named(module, *reached.args)
            except Exception as error:
                failure = failure or f": {error}"
    raise InputError(f"{type(decoder).__name__} does not call its {type(module).__name__}{failure}")


def _stop(_: nn.Module, args: Any, kwargs: Any) -> None:
    raise _Reached(args, kwargs)


def _drawn(inputs: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Inputs that are only shapes, with values."""
    generator = torch.Generator().manual_seed(0)
    drawn = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_meta:
            masks = name.endswith("mask")
            new = (
                torch.ones(value.shape) if masks else torch.randn(value.shape, generator=generator)
            )
            drawn[name] = new.to(like)
        elif isinstance(value, Tensor):
            drawn[name] = value.to(like.device)
    return drawn


def _head_counts(site: BoundSite) -> set[int]:
    """How many heads there are: KV groups, and as many query heads as widths let suppose."""
    widths = [block.width for linear in site.linears for block in linear.binding.blocks]
    lanes = site.site.lanes
    return {lanes, lanes * (max(widths) // min(widths))}


def _candidates(site: BoundSite) -> list[tuple[str, str, int]]:
    """Integers that may count heads: equal to the number of heads or groups, or their features.

    What counts layers, or says which one this is, may be as large by accident.
    """
    lanes = site.site.lanes
    widths = [block.width for linear in site.linears for block in linear.binding.blocks]
    sizes = {*_head_counts(site), *(linear.features for linear in site.linears)}
    sizes |= {lanes * width for width in widths}
    owners: dict[str, Any] = {"module": site.module, "config": getattr(site.module, "config", None)}
    return [
        (owner, name, value)
        for owner, holder in owners.items()
        for name, value in getattr(holder, "__dict__", {}).items()
        if type(value) is int
        and value in sizes
        and not name.startswith("_")
        and "layer" not in name
    ]


def _by_head(site: BoundSite, given: Given) -> tuple[tuple[str, int, int], ...]:
    """Arguments that may have an entry for every head; see `AttentionBlock`."""
    counts = _head_counts(site)
    return tuple(
        (name, value.shape.index(count), count)
        for name, value in list(given.items())[1:]
        if isinstance(value, Tensor) and value.is_floating_point()
        for count in value.shape
        if count in counts
    )[:1]


def _parameters(site: BoundSite) -> list[tuple[tuple[str, str, int, int], ...]]:
    """Parameters that may have an entry for every head, by module; see `AttentionBlock`."""
    counts = _head_counts(site)
    linears = {id(module) for linear in site.linears for module in linear.host.modules()}
    found = []
    for path, module in site.module.named_modules():
        here = tuple(
            (path, name, parameter.shape.index(count), count)
            for name, parameter in module.named_parameters(recurse=False)
            for count in [next((size for size in parameter.shape if size in counts), 0)]
            if count and id(module) not in linears
        )
        found += [here] if here else []
    every = tuple(chain.from_iterable(found))
    return list(dict.fromkeys([(), every, *found]))


def _attempts(found: list[tuple[str, str, int]]) -> Iterator[tuple[tuple[str, str, int], ...]]:
    """None, all, then subsets: integers that matter and integers that only look alike."""
    own = [integer for integer in found if integer[0] == "module"]
    yield ()
    yield tuple(found)
    # Those of the config are rarely read and rarely in the way; try them all or not at all.
    rest = tuple(integer for integer in found if integer[0] == "config")
    for subset in chain.from_iterable(combinations(own, n) for n in range(len(own) + 1)):
        yield subset
        yield (*subset, *rest)


def _projected(site: BoundSite, output: Any) -> Tensor:
    """The hidden states of a block's result, behind its last linear."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found if site.projects else site.sink.host(found)


@torch.no_grad()
def probe(decoder: nn.Module, site: BoundSite, width: int) -> AttentionBlock:
    """Find out how to narrow one attention block, and that the result is right.

    Nothing of the decoder, the text model of this width, may be narrowed at the time. Raises
    InputError where nothing makes the narrowed block agree with the masked one.
    """
    given = arguments_of(decoder, site.module, width)
    with evaluating(site.module):
        output = site.module(**given)
        shape = None
        handed_on: tuple[str, ...] = ()
        if isinstance(output, tuple):
            shape = tuple(place is output[0] for place in output)
            names = {id(value): name for name, value in given.items() if value is not None}
            handed_on = tuple(names.get(id(place), "") for place in output)
        lanes = site.site.lanes
        added = _added(site, given)
        kept: list[Intervals] = [((0, 1),), ((1, lanes),)] if lanes > 1 else []
        expected = [_masked(site, runs, given) for runs in kept]
        ways = product(
            dict.fromkeys(((), _by_head(site, given))),
            _parameters(site),
            list(_attempts(_candidates(site))),
        )
        for arguments, parameters, integers in ways:
            if added is None:
                break
            block = AttentionBlock(lanes, integers, shape, arguments, parameters, handed_on, added)
            if all(
                _agrees(block, site, runs, given, right)
                for runs, right in zip(kept, expected, strict=True)
            ):
                return block
    raise InputError(
        f"the heads of {site.site.module} ({type(site.module).__name__}) cannot be narrowed: it "
        f"does not give the same result as with masked heads; plan without head switches"
    )


def _added(site: BoundSite, given: Given) -> str | None:
    """Which argument the block adds to its result, "" for none; None where it adds what is unknown.

    Seen where no head is left.
    """
    rest = _masked(site, (), given)
    if site.sink.bias is not None:
        rest = rest - site.sink.bias
    others = {
        name: v for name, v in given.items() if isinstance(v, Tensor) and v.shape == rest.shape
    }
    scale = max(value.norm() for value in others.values())
    for name, value in {"": torch.zeros_like(rest), **others}.items():
        if (rest - value).norm() <= torch.finfo(rest.dtype).eps ** 0.5 * scale:
            return name
    return None


def _masked(site: BoundSite, lanes: Intervals, given: Given) -> Tensor:
    """The block's result with the outputs of all other heads multiplied by zero."""
    sink = site.sink
    mask = torch.zeros(sink.features, device=sink.weight.device, dtype=sink.weight.dtype)
    for start, stop in sink.runs(lanes):
        mask[start:stop] = 1

    def hide(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0] * mask

    with sink.host.register_forward_pre_hook(hide):
        return _projected(site, site.module(**given))


def _agrees(
    block: AttentionBlock, site: BoundSite, lanes: Intervals, given: Given, expected: Tensor
) -> bool:
    count = count_of(lanes)
    with Patches() as patches:
        for linear in site.linears:
            patches.set(linear.module, "forward", KeptProduct(linear, lanes))
        for name, value in block.changes(count, "module").items():
            patches.set(site.module, name, value)
        replaced = block.changes(count, "config")
        if replaced:
            patches.set(site.module, "config", ConfigView(site.module.config, **replaced))
        try:
            result = _projected(site, block.run(site.module, site.module, given, lanes))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    return is_close(result, expected)
