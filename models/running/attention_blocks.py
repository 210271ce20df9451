"""What narrowing heads asks of an attention block beyond its weights.

Most attention blocks take the number of heads from the width of what their projections return.
Some also hold it as an integer: GPT-2 splits its fused projection at ``split_size``, Phi-3 at
``config.num_attention_heads * head_dim``. Which integers those are is found by trying: a block is
run on a few tokens, narrowed, and compared with itself with the same heads masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.ir.intervals import Intervals, count_of
from planner.models.running.bindings import BoundSite
from planner.models.running.patches import ConfigView, Patches
from planner.models.running.products import KeptProduct

PROBE_TOKENS = 5


@dataclass(frozen=True)
class AttentionBlock:
    """What was found out about one attention block.

    Attributes:
        lanes: KV groups of the base model.
        integers: (owner, name, value): integers that count heads or their features; the owner is
            ``module`` or ``config``.
        output: what stands in each place of the block's result: True for the hidden states, False
            for anything else; None where the result is the hidden states alone.
    """

    lanes: int
    integers: tuple[tuple[str, str, int], ...]
    output: tuple[bool, ...] | None

    def changes(self, kept: int, owner: str) -> dict[str, int]:
        """The integers of one owner with `kept` groups left."""
        return {
            name: value * kept // self.lanes
            for holder, name, value in self.integers
            if holder == owner
        }


def headless(hidden: Tensor, bias: Tensor | None, output: Sequence[bool] | None) -> Any:
    """A block's result with no head left: its last linear's bias, laid out as `output` says."""
    result = torch.zeros_like(hidden)
    result = result if bias is None else result + bias.to(hidden.dtype)
    if output is None:
        return result
    return tuple(result if is_hidden else None for is_hidden in output)


class _Reached(Exception):
    """Carries the arguments of a module out of a forward pass that need not go on."""


def _arguments(decoder: nn.Module, block: nn.Module, width: int) -> tuple[Any, Any]:
    """How the decoder calls an attention block."""
    parameter = next(block.parameters())
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, PROBE_TOKENS, width, generator=generator)

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(args, kwargs)

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder(inputs_embeds=embeddings.to(parameter), use_cache=False)
    except _Reached as reached:
        args, kwargs = reached.args
        return args, kwargs
    finally:
        handle.remove()
    raise InputError(f"{type(decoder).__name__} does not call its {type(block).__name__}")


def _candidates(site: BoundSite) -> list[tuple[str, str, int]]:
    """Integers that may count heads: equal to the number of heads or groups, or their features."""
    lanes = site.site.lanes
    widths = [block.width for linear in site.linears for block in linear.binding.blocks]
    heads = lanes * (max(widths) // min(widths))
    sizes = {lanes, heads, *(linear.features for linear in site.linears)}
    sizes |= {lanes * width for width in widths}
    owners: dict[str, Any] = {"module": site.module, "config": getattr(site.module, "config", None)}
    return [
        (owner, name, value)
        for owner, holder in owners.items()
        for name, value in getattr(holder, "__dict__", {}).items()
        if type(value) is int and value in sizes and not name.startswith("_")
    ]


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


def _hidden(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def probe(decoder: nn.Module, site: BoundSite, width: int) -> AttentionBlock:
    """Find out how to narrow one attention block, and that the result is right.

    Args:
        decoder: the text model; nothing of it may be narrowed at the time.
        site: the heads of one layer.
        width: hidden size.

    Raises:
        InputError: no choice of integers makes the narrowed block agree with the masked one.
    """
    args, kwargs = _arguments(decoder, site.module, width)
    was_training = site.module.training
    site.module.eval()
    try:
        output = site.module(*args, **kwargs)
        shape = None
        if isinstance(output, tuple):
            shape = tuple(place is output[0] for place in output)
        lanes = site.site.lanes
        kept: list[Intervals] = [((0, 1),), ((1, lanes),)] if lanes > 1 else []
        expected = [_masked(site, runs, args, kwargs) for runs in kept]
        for integers in _attempts(_candidates(site)):
            block = AttentionBlock(lanes, integers, shape)
            if all(
                _agrees(block, site, runs, args, kwargs, right)
                for runs, right in zip(kept, expected, strict=True)
            ):
                return block
    finally:
        site.module.train(was_training)
    raise InputError(
        f"the heads of {site.site.module} ({type(site.module).__name__}) cannot be narrowed: it "
        f"does not give the same result as with masked heads; plan without head switches"
    )


def _masked(site: BoundSite, lanes: Intervals, args: Any, kwargs: Any) -> Tensor:
    """The block's result with the outputs of all other heads multiplied by zero."""
    sink = site.sink
    mask = torch.zeros(sink.features, device=sink.weight.device, dtype=sink.weight.dtype)
    for start, stop in sink.runs(lanes):
        mask[start:stop] = 1

    def hide(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0] * mask

    handle = sink.host.register_forward_pre_hook(hide)
    try:
        return _hidden(site.module(*args, **kwargs))
    finally:
        handle.remove()


def _agrees(
    block: AttentionBlock,
    site: BoundSite,
    lanes: Intervals,
    args: Any,
    kwargs: Any,
    expected: Tensor,
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
            result = _hidden(site.module(*args, **kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    if result.shape != expected.shape:
        return False
    error = (result.double() - expected.double()).norm()
    precision = torch.finfo(expected.dtype).eps ** 0.5
    return bool(error <= precision * expected.double().norm())
