"""Makes a stock model obey plans, and gives it back as it was.

    executor = Executor(model, graph)
    with executor.using(plan):
        model.generate(**inputs)

The stock code runs unchanged. While a plan is active, `forward` of the modules that the plan
touches is shadowed on the instance: linears compute with what is kept, layers that are off return
their input, layers behind a token stage run on the tokens that are left. So is that of the other
linears of the decoder, where products have a faster way than the stock one
(`planner.kernels.ops.kept_linear`). Parameters, submodules and hooks are never replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.running.attention_blocks import AttentionBlock, probe
from planner.models.running.bindings import BoundLayer, BoundLinear, BoundSite, bind
from planner.models.running.forward_pass import Passes
from planner.models.running.layers import AttentionForward, LayerForward, Setup
from planner.models.running.narrowed_linear import LinearForward, SliceStore
from planner.models.running.patches import ConfigView, Patches
from planner.models.running.program import LayerGroup, LayerProgram, Program
from planner.models.running.recording import recording
from planner.models.tokens.token_stages import Places, TokenStages
from planner.plan import Plan

__all__ = ["Executor"]

Plans = Plan | Sequence[Plan]


class Executor:
    """Runs one model under plans.

    Args:
        model: a stock transformers model.
        graph: its Graph, as lowered; module paths and feature layouts are taken from here alone.
        slice_bytes: bound on copies of narrowed weights kept for plans that come again; by default
            the bytes of the model. With 0 nothing is copied.

    Raises:
        InputError: the graph is not of this model.
    """

    def __init__(self, model: nn.Module, graph: Graph, slice_bytes: int | None = None) -> None:
        self.model = model
        self.graph = graph
        self.layers = bind(model, graph)
        if slice_bytes is None:
            slice_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.slices = SliceStore(slice_bytes)
        self._attention: dict[Any, AttentionBlock] = {}
        # Programs, and whether each is to stay: the innermost block's is last.
        self._active: list[tuple[Program, bool]] = []
        self._patches = Patches()
        self._stages: TokenStages | None = None
        self._passes: Passes | None = None
        self._places: Places | None = None

    @property
    def program(self) -> Program | None:
        """What is active now; None is the base model."""
        return self._active[-1][0] if self._active else None

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """How many image tokens were kept of the last prompt.

        Returns:
            Layer of a token stage -> what was left behind it, one number a row of the batch. Empty
            before the first prompt, and where no token is dropped.
        """
        kept = {} if self._stages is None else self._stages.kept
        return {layer: counts.tolist() for layer, counts in sorted(kept.items())}

    def attach(self, plans: Plans) -> None:
        """Make plans active until `detach` or another `attach`.

        Args:
            plans: as for `using`. Narrowed weights are copied at once, for speed.

        Raises:
            InputError: a plan does not fit the model; nothing has changed then.
        """
        before, program = self._active, self.build(plans)
        try:
            self._switch([(program, True)])
        except BaseException:
            self._switch(before)
            raise

    def detach(self) -> None:
        """Give the model back exactly as it was."""
        self._places = None
        self._switch([])
        self.slices.clear()

    @contextmanager
    def using(self, plans: Plans) -> Iterator[None]:
        """Make plans active for a block; blocks nest.

        Args:
            plans: one plan for all samples, or one per sample of the batches to come.

        Raises:
            InputError: a plan does not fit the model; nothing has changed then.
        """
        before, program = self._active, self.build(plans)
        try:
            self._switch([*before, (program, False)])
            yield
        finally:
            self._switch(before)

    def prepare(self) -> None:
        """Learn ahead all that narrowing heads takes, which runs blocks of the model.

        `redirect` cannot do that in the middle of a forward pass.
        """
        for layer in self.layers:
            if layer.heads is not None and not layer.heads.obstacle:
                self._probed(layer.heads)

    def follow(self, program: Program, places: Places | None = None) -> None:
        """Make a program active that `redirect` may change; even a dense one is then installed.

        Args:
            program: of plans that `build` has checked.
            places: see `TokenStages`.
        """
        self._places = places
        self._switch([(program, False)], always=True)

    def resume(self, program: Program) -> None:
        """Go on with another program between two forward passes; it has the same token stages."""
        self._patches.undo()
        self._active = [(program, False)]
        self._install(program, False)

    def redirect(self, plans: Plans) -> Program:
        """Go on under other plans in the middle of a prompt's forward pass.

        Call between two layers, under a program set by `follow`. The layers that have run must do
        the same under the old plans and the new, and the token stages must be among them.

        Returns:
            The new program, for `resume` when the same cache is met again.

        Raises:
            InputError: a plan does not fit the model, or no pass is being made.
        """
        passes, program = self._passes, self.build(plans)
        if passes is None or passes.current is None:
            raise InputError("plans can be changed in mid-pass only while a prompt is being read")
        self._patches.undo()
        self._active = [(program, False)]
        self._install(program, False, passes)
        return program

    def build(self, plans: Plans) -> Program:
        """Check plans and work out who does what; raises InputError where one does not fit."""
        plans = [plans] if isinstance(plans, Plan) else list(plans)
        if not plans:
            raise InputError("an empty list of plans; give one plan, or one per sample")
        return Program.build(plans, self.graph, self.layers)

    def _switch(self, active: list[tuple[Program, bool]], always: bool = False) -> None:
        self._patches.undo()
        if self._stages is not None:
            self._stages.close()
            self._stages = None
        self._passes = None
        self._active = active
        if active and (always or not active[-1][0].is_dense):
            self._install(*active[-1])

    def _install(self, program: Program, keep: bool, under_way: Passes | None = None) -> None:
        """Shadow what the program touches.

        `keep`: it will stay, so weights are copied at once. `under_way`: a pass to go on with.
        """
        # Probing runs the model, so it comes before any change.
        blocks = [self._block(layer) for layer in program.layers]
        self.slices.begin()
        if program.has_tokens and self._stages is None:
            self._stages = TokenStages(self.model, self.graph, program, self._places)
        passes = Passes(program, self._stages)
        if under_way is not None:
            passes.take_over(under_way)
        self._passes = passes
        for layer, block in zip(program.layers, blocks, strict=True):
            forward = LayerForward(passes, layer, self._setups(layer, block, passes, keep))
            self._patches.set(layer.layer.module, "forward", forward)
        if not program.is_dense:
            touched = {layer.layer.index for layer in program.layers}
            for bound in self.layers:
                if bound.index not in touched:
                    self._multiply(bound)

    def _multiply(self, layer: BoundLayer) -> None:
        """Have a layer that stays as it is multiply as the others do."""
        for site in (layer.heads, layer.mlp):
            for linear in () if site is None else site.linears:
                forward = LinearForward(linear.module)
                if forward.whole is not None:
                    forward.active = forward.whole
                    self._patches.set(linear.module, "forward", forward)

    def _block(self, layer: LayerProgram) -> AttentionBlock | None:
        """What narrowing this layer's heads takes; None where no group narrows them."""
        site = layer.layer.heads
        if site is None or all(group.heads is None for group in layer.groups):
            return None
        return self._probed(site)

    def _probed(self, site: BoundSite) -> AttentionBlock:
        # Blocks of one class and one layout behave alike.
        layout = tuple((linear.features, linear.binding.blocks) for linear in site.linears)
        key = (type(site.module), site.site.lanes, layout)
        if key not in self._attention:
            decoder = cast(Any, self.model).get_decoder()
            width = int(self.graph.properties["hidden_size"])
            self._attention[key] = probe(decoder, site, width)
        return self._attention[key]

    def _setups(
        self, layer: LayerProgram, block: AttentionBlock | None, passes: Passes, keep: bool
    ) -> tuple[Setup, ...]:
        """How the layer runs for each of its groups, with the modules that this takes in place."""
        heads, mlp = layer.layer.heads, layer.layer.mlp
        forwards: list[tuple[str, BoundLinear, LinearForward]] = []
        for kind, site in (("heads", heads), ("mlp", mlp)):
            if site is None:
                continue
            narrows = any(getattr(group, kind) is not None for group in layer.groups)
            for linear in site.linears:
                forward = LinearForward(linear.module)
                if narrows or forward.whole is not None:
                    self._patches.set(linear.module, "forward", forward)
                    forwards.append((kind, linear, forward))
        attention = None
        if heads is not None and block is not None and any(g.heads == () for g in layer.groups):
            attention = AttentionForward(heads, block)
            self._patches.set(heads.module, "forward", attention)
        setups = []
        for group in layer.groups:
            weights = []
            for kind, linear, forward in forwards:
                lanes = getattr(group, kind)
                active = forward.whole
                if lanes is not None:
                    active = self.slices.get(linear, lanes, keep)
                weights.append((forward, active))
            attributes = _attributes(layer, group, block, passes)
            setups.append(Setup(group, tuple(weights), heads, attributes, attention))
        if heads is not None:
            for name, value in setups[0].attributes.items():
                self._patches.set(heads.module, name, value)
        setups[0].activate()
        return tuple(setups)


def _attributes(
    program: LayerProgram, group: LayerGroup, block: AttentionBlock | None, passes: Passes
) -> dict[str, Any]:
    """What an attention block's own attributes must be for a group: head counts, and its config."""
    layer = program.layer
    if layer.heads is None:
        return {}
    attributes: dict[str, Any] = {}
    replaced: dict[str, int] = {}
    if block is not None:
        kept = block.lanes if group.heads is None else sum(b - a for a, b in group.heads)
        attributes |= block.changes(kept, "module")
        replaced |= block.changes(kept, "config")
    config = getattr(layer.heads.module, "config", None)
    recorded = passes.stages.recorded if passes.stages is not None else ()
    evicts = any(other.kv is not None for other in program.groups)
    if (evicts or layer.index in recorded) and config is not None:
        record = partial(passes.record, layer.index)
        attributes["config"] = recording(config, record, **replaced)
    elif replaced:
        attributes["config"] = ConfigView(config, **replaced)
    return attributes
