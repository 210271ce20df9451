"""A program made ready for a model: what stands where while it runs."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.intervals import count_of
from planner.ir.lowering.decoder import decoder_of
from planner.models.running.attention_blocks import AttentionBlock, probe
from planner.models.running.attention_calls import RECORDING
from planner.models.running.bindings import BoundSite
from planner.models.running.forward_pass import Passes
from planner.models.running.layer_results import LayerResult, result_of
from planner.models.running.layers import AttentionForward, LayerForward, Setup
from planner.models.running.patches import ConfigView, Patches, Shadow
from planner.models.running.products import BlockForward, Product, Products
from planner.models.running.program import LayerGroup, LayerProgram, Program
from planner.models.running.session import Session
from planner.models.tokens.answer_stage import AnswerStage
from planner.models.tokens.summed_up import SummingStage
from planner.models.tokens.token_stages import Places, TokenStages
from planner.models.tokens.tower_stage import TowerStage
from planner.models.tokens.vision_stage import VisionStage
from planner.planning.selectors import TowerSelector, VisionSelector

if TYPE_CHECKING:
    from planner.models.running.skipping import Skipping

# Attributes of transformers' layers: whether, and by what function, they keep no activations.
CHECKPOINTS, CHECKPOINT = "gradient_checkpointing", "_gradient_checkpointing_func"


class Ready:
    """What stands where while a program runs.

    `stages`: its token stages; None where no token is dropped. `again`: runs a layer again in a
    backward pass, see `Skipping.again`.
    """

    def __init__(
        self, program: Program, stages: TokenStages | None, again: Callable[..., Any]
    ) -> None:
        self.program = program
        self.stages = stages
        self._again = again
        self.passes = Passes(program, stages)
        self.shadows: list[tuple[nn.Module, Shadow]] = []
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self.products: list[Product] = []
        self._patches = Patches()

    @property
    def kept_image_tokens(self) -> dict[int, list[int]]:
        """Layer of a token stage -> image tokens left of the last prompt, by row of its batch.

        Empty before the first prompt, and where no token is dropped.
        """
        kept = {} if self.stages is None else self.stages.kept
        return {layer: counts.tolist() for layer, counts in sorted(kept.items())}

    def put_in_place(self) -> None:
        """Shadow what the program touches."""
        self.refresh()
        for module, shadow in self.shadows:
            # Whole weights are multiplied in their own way where others have put a `forward`.
            if shadow.narrows or "forward" not in module.__dict__:
                self._patches.shadow(module, shadow)
            if isinstance(shadow, LayerForward) and getattr(module, CHECKPOINTS, False):
                checkpoint = partial(self._checkpoint, shadow, getattr(module, CHECKPOINT))
                self._patches.set(module, CHECKPOINT, checkpoint)
        for module, name, value in self.attributes:
            self._patches.set(module, name, value)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins with the call of a module, and these arguments."""
        for stage in (self.stages, self.passes.answers, self.passes.summing):
            if stage is not None:
                stage.remember(module, args, kwargs)

    def refresh(self) -> None:
        """Look what weights are now."""
        for product in self.products:
            product.refresh()

    def end(self) -> None:
        """Let go of a pass, and of its arguments."""
        self.passes.end()
        for stage in (self.stages, self.passes.answers, self.passes.summing):
            if stage is not None:
                stage.arguments = {}

    def _checkpoint(self, layer: LayerForward, stock: Any, run: Any, *args: Any) -> Any:
        """Stands in for a layer's function for gradient checkpointing."""
        again = partial(self._again, self, layer.setup, self.passes.current, run)
        return stock(again, *args)

    def take_away(self) -> None:
        """Undo it."""
        self._patches.undo()


class Preparing:
    """Makes programs ready for the model of a session."""

    # Programs of this many sets of plans stay ready.
    READY = 32

    def __init__(self, session: Session, products: Products, runs: Skipping) -> None:
        self.session, self.products, self.runs = session, products, runs
        self._visions: dict[VisionSelector, VisionStage] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._ready: OrderedDict[tuple[object, ...], Ready] = OrderedDict()
        self._attention: dict[Any, AttentionBlock | InputError] = {}
        self._results: dict[tuple[type[nn.Module], bool], LayerResult] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew, of the modules of a copy."""
        return {name: self.__dict__[name] for name in ("session", "products", "runs", "_visions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    def use(self, products: Products) -> None:
        """Compute with other products from now on."""
        self.products = products
        self._ready.clear()

    def close(self) -> None:
        """Give the model back as it was."""
        for vision in self._visions.values():
            vision.close()

    def ready(self, program: Program | None) -> Ready | None:
        """What stands where under a program; None where nothing is left out."""
        if program is None or program.is_dense:
            return None
        known = self._ready.get(program.key)
        if known is None or known.program is not program:
            known = self._ready[program.key] = self.ready_always(program)
            if len(self._ready) > self.READY:
                self._ready.popitem(last=False)
        return known

    def ready_always(self, program: Program, places: Places | None = None) -> Ready:
        """As `ready`, for a program that may be redirected in mid-pass, even a dense one.

        For `places` see `TokenStages`.
        """
        stages = None
        if program.has_tokens:
            kernels = self.products.kernels
            norm = self._final_norm()
            stages = TokenStages(self.session.model, program, self._vision, places, kernels, norm)
        ready = self.redirected(program, stages)
        if program.answer_policies:
            model, policies = self.session.model, program.answer_policies
            ready.passes.answers = AnswerStage(model, policies, places)
        if program.sums_up:
            ready.passes.summing = SummingStage(self.session.model, places)
        return ready

    def prepare(self, graph: Graph) -> None:
        """Learn ahead what narrowing a graph's sites takes: it runs blocks, which no pass may."""
        for layer in self.session.layers:
            self._result(LayerProgram(layer, (LayerGroup((), on=False),)))
            for site in (layer.heads, layer.mlp):
                if site is None or site.obstacle or site.site.name not in graph.sites_by_name:
                    continue
                if site.site.kind == "heads":
                    self._probed(site)
                else:
                    self.products.mlp(site, None)

    def refused(self) -> dict[str, str]:
        """Sites that cannot be narrowed in this model, whatever its Graph says: name -> why."""
        obstacles = {
            site.site.name: self._obstacle(site)
            for layer in self.session.layers
            for site in (layer.heads, layer.mlp)
            if site is not None
        }
        return {name: obstacle for name, obstacle in obstacles.items() if obstacle}

    def _obstacle(self, site: BoundSite) -> str:
        if site.obstacle or site.site.kind != "heads":
            return site.obstacle
        try:
            self._probed(site)
        except InputError as error:
            return str(error)
        return ""

    def _vision(self, selector: VisionSelector) -> VisionStage:
        """The stage of a selector in front of the decoder, which works where it is active."""
        if selector not in self._visions:
            model, graph = self.session.model, self.session.graph
            active = self.runs.is_active
            if isinstance(selector, TowerSelector):
                self._visions[selector] = TowerStage(model, graph, selector, active)
            else:
                self._visions[selector] = VisionStage(model, graph, selector, active)
        return self._visions[selector]

    def _rotary(self) -> nn.Module | None:
        """What makes position ids into arguments of the decoder's layers."""
        model: Any = self.session.model
        for module in decoder_of(model).children():
            if list(inspect.signature(module.forward).parameters)[:2] == ["x", "position_ids"]:
                return cast(nn.Module, module)
        return None

    def _final_norm(self) -> nn.Module | None:
        """What the decoder does behind its last layer."""
        for operator in reversed(self.session.graph.operators):
            if (operator.part, operator.kind, operator.layer) == ("decoder", "norm", None):
                return self.session.model.get_submodule(operator.module)
        return None

    def redirected(self, program: Program, stages: TokenStages | None) -> Ready:
        """As `ready_always`, for a pass whose token stages go on."""
        ready = Ready(program, stages, self.runs.again)
        ready.passes.rotary = self._rotary()
        for layer in program.layers:
            setups = self._setups(layer, ready)
            forward = LayerForward(ready.passes, layer, setups, self._result(layer))
            ready.passes.layers.append(forward)
            ready.shadows.append((layer.layer.module, forward))
        return ready

    def _result(self, layer: LayerProgram) -> LayerResult:
        """What the layer takes and returns, where that is asked."""
        if len(layer.groups) == 1 and layer.groups[0].on:
            return LayerResult()
        module = layer.layer.module
        # A layer that others depend on takes other arguments than those which can be left out.
        kind = type(module), f"layer.{layer.layer.index}" in self.session.graph.sites_by_name
        if kind not in self._results:
            with self._trying() as (decoder, width):
                self._results[kind] = result_of(decoder, module, width)
        return self._results[kind]

    def _setups(self, layer: LayerProgram, ready: Ready) -> tuple[Setup, ...]:
        """How the layer runs for each of its groups; what that takes is noted to be shadowed."""
        heads = layer.layer.heads
        computed = [
            self._forwards(site, [getattr(group, kind) for group in layer.groups], ready)
            for kind, site in (("heads", heads), ("mlp", layer.layer.mlp))
        ]
        block = attention = None
        if heads is not None and any(group.heads is not None for group in layer.groups):
            block = self._probed(heads)
            by_head = block.arguments or block.parameters
            if by_head or any(group.heads == () for group in layer.groups):
                attention = AttentionForward(heads, block)
                ready.shadows.append((heads.module, attention))
        setups = []
        for number, group in enumerate(layer.groups):
            products = tuple((f, active[number]) for f, active in (*computed[0], *computed[1]))
            attributes = self._attributes(layer, group, block, ready.passes)
            setups.append(Setup(group, products, heads, attributes, attention))
        if heads is not None:
            first = setups[0].attributes
            ready.attributes += [(heads.module, name, value) for name, value in first.items()]
        setups[0].compute()
        return tuple(setups)

    def _forwards(
        self, site: BoundSite | None, kept: list[Any], ready: Ready
    ) -> list[tuple[BlockForward, list[Product | None]]]:
        """What stands in for modules of a site, and computes what by group with the lanes kept."""
        if site is None or site.obstacle:
            return []
        asked: list[tuple[nn.Module, list[Product | None]]] = []
        if site.site.kind == "mlp":
            with self.runs.alone():
                whole = [self.products.mlp(site, lanes) for lanes in kept]
            if any(product is not None for product in whole):
                asked.append((site.module, whole))
        if not asked:
            for linear in site.linears:
                active = [self.products.linear(linear, lanes) for lanes in kept]
                asked.append((linear.module, active))
        forwards = []
        for module, active in asked:
            if any(product is not None for product in active):
                forward = BlockForward(narrows=any(lanes is not None for lanes in kept))
                ready.shadows.append((module, forward))
                ready.products += [product for product in active if product is not None]
                forwards.append((forward, active))
        return forwards

    def _probed(self, site: BoundSite) -> AttentionBlock:
        if site.behaviour not in self._attention:
            with self._trying() as (decoder, width):
                try:
                    self._attention[site.behaviour] = probe(decoder, site, width)
                except InputError as why:
                    self._attention[site.behaviour] = why
        known = self._attention[site.behaviour]
        if isinstance(known, InputError):
            raise known
        return known

    @contextmanager
    def _trying(self) -> Iterator[tuple[nn.Module, int]]:
        """The decoder and its width, to find something out by running it."""
        if self.runs.is_running:
            raise InputError("a plan of a new kind was set in the middle of a pass")
        model: Any = self.session.model
        with self.runs.alone():
            yield decoder_of(model), int(self.session.graph.properties["hidden_size"])

    def _attributes(
        self, program: LayerProgram, group: LayerGroup, block: AttentionBlock | None, passes: Passes
    ) -> dict[str, Any]:
        """What an attention block's own attributes must be: head counts, and its config."""
        site = program.layer.heads
        if site is None:
            return {}
        attributes: dict[str, Any] = {}
        replaced: dict[str, Any] = {}
        if block is not None:
            kept = block.lanes if group.heads is None else count_of(group.heads)
            attributes |= block.changes(kept, "module")
            replaced |= block.changes(kept, "config")
        function = self.products.attention(site)
        config = getattr(site.module, "config", None)
        # A scheduler decides in the middle of a pass, when the block has a view already.
        config = getattr(config, "original_config", config)
        recorded = passes.stages.asked if passes.stages is not None else ()
        policies = [other.kv for other in program.groups if other.kv is not None]
        evicts = any(policy.scores_by_attention for policy in policies)
        if (evicts or program.layer.index in recorded) and config is not None:
            record = partial(passes.record, program.layer.index)
            replaced |= {"_attn_implementation": RECORDING, "record": record, "attention": function}
        elif function is not None:
            replaced["_attn_implementation"] = function
        if replaced:
            attributes["config"] = ConfigView(config, **replaced)
        return attributes
