"""Token stages: which image tokens there are, and which of them go on from a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.kernels.choice import Kernels, with_triton
from planner.kernels.ops.gather_tokens import GatherTokens
from planner.loading import visual_tokens
from planner.models.running.attention_blocks import named
from planner.models.running.attention_calls import Recorded
from planner.models.running.forward_pass import Call
from planner.models.running.program import LayerGroup, Program
from planner.models.running.prompts import is_visual
from planner.models.tokens.kept_tokens import Kept, gather, scatter
from planner.models.tokens.predictors import ImagePredictor, load_predictors
from planner.models.tokens.selectors import (
    DecoderInputs,
    LayerAttention,
    mark_tokens,
    select_tokens,
)
from planner.models.tokens.vision_stage import VisionStage
from planner.plan import TokenStage
from planner.planning.selectors import (
    DecoderSelector,
    DynamicLLaVA,
    Needs,
    Selector,
    VisionSelector,
    selector_of,
)

# Of tokens that are not learned, as in transformers.
_NO_LABEL = -100

Places = Callable[[Tensor, bool], Tensor]


class TokenStages:
    """Carries out the token stages of a program.

    Args:
        model: the whole model; its arguments say where images are.
        visions: gives the vision stage of a selector.
        places: carries what is known of the model's tokens, shape (batch, tokens), over to the
            tokens that the decoder gets, with the given value for those in addition.
        norm: the decoder's last; None where it has none.

    Raises InputError: a stage cannot be carried out on this model.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        visions: Callable[[VisionSelector], VisionStage],
        places: Places | None = None,
        kernels: Kernels = Kernels.TORCH,
        norm: nn.Module | None = None,
    ) -> None:
        self.program = program
        self.kernels = kernels
        self._places = places or (lambda known, value: known)
        self.selectors: dict[TokenStage, DecoderSelector] = {}
        self.recorded: set[int] = set()  # layers whose attention some selector scores tokens by
        # Stages that score by a layer that has not run yet, and those layers.
        self.look_ahead: dict[TokenStage, tuple[int, ...]] = {}
        # Layer of a stage -> image tokens of the last prompt that were left behind it, (batch,).
        self.kept: dict[int, Tensor] = {}
        # What a scheduler keeps of this pass's tokens, (batch, tokens), bool; None without one.
        self.chosen: Tensor | None = None
        self.model = model
        self._norm = norm
        if not visual_tokens(model.config):
            raise InputError(
                f"{type(model).__name__} takes no images, so a plan cannot drop image tokens"
            )
        vision = None
        self._predictors: dict[DecoderSelector, ImagePredictor] = {}
        for stage in {stage for plan in program.plans for stage in plan.tokens}:
            selector = selector_of(stage)
            if isinstance(selector, VisionSelector):
                if any(stage not in plan.tokens for plan in program.plans):
                    raise InputError(
                        f"{stage.selector} works on all images at once, so all plans of a batch "
                        f"must have it"
                    )
                vision = selector
            else:
                self.selectors[stage] = selector
                if isinstance(selector, DynamicLLaVA):
                    self._predictors[selector] = _image_predictor(selector, model)
                if Needs.QUERY_KEY in selector.needs:
                    self.recorded.update(program.scored_by(stage))
                if Needs.NEXT_QUERY_KEY in selector.needs:
                    self.look_ahead[stage] = tuple(program.scored_by(stage))
        self.vision = None if vision is None else visions(vision)
        self.arguments: dict[str, Any] = {}  # of the model in this pass
        # Layers whose attention has to be seen.
        self.asked = self.recorded.union(*self.look_ahead.values())

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model was called with, or the part of it that a pass began with."""
        self.arguments = named(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, call: Call, hidden: Tensor) -> Tensor:
        """Find the images of a prompt, before layer 0, and note them and padding in the call.

        Returns the hidden states without marks of a vision selector; raises InputError where there
        is no telling where images are.
        """
        ids, image = self.arguments.get("input_ids"), None
        if ids is not None:
            image = is_visual(ids.to(hidden.device), self.model)
            # Masks cover all tokens from the first on, ids just those of this pass.
            image = image if call.past else self._places(image, False)
        if image is None or tuple(image.shape[:2]) != (call.batch, call.tokens):
            raise InputError(
                "a plan with token stages finds the images by their tokens: call the whole model, "
                "with input_ids rather than inputs_embeds"
            )
        if image.any():
            call.image = image
        if call.image is not None or not call.past:
            self.kept = {}
        self._note_drafts(call)
        cached = call.first_cached
        if cached is not None:
            if cached.ends_in_image and image[:, 0].any():
                raise InputError(
                    "prefill_chunk_size cuts an image in two, so its tokens cannot be compared; "
                    "leave it out, or use a plan without token stages"
                )
            cached.ends_in_image = bool(image[:, -1].any())
        mask = self.arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
            call.valid = self._places(mask.to(hidden.device).bool(), True)
        if self.vision is not None and call.image is not None:
            if ids is not None and is_visual(ids, self.model, "video").any():
                raise InputError(
                    f"{self.vision.selector} picks patches of images, and the prompt has a video; "
                    f"use a selector that works in the decoder, such as fastv"
                )
            call.unwanted = image & (hidden == torch.inf).all(-1)
            hidden = hidden.masked_fill(call.unwanted[:, :, None], 0)
        for selector in self.selectors.values():
            if Needs.MARKS in selector.needs and call.image is not None:
                call.marks[selector] = mark_tokens(selector, hidden, image, self._asked(call))
        return hidden

    def _asked(self, call: Call) -> Tensor:
        """Tokens of the prompt, without answers that are learned and what follows the last one.

        Where nothing else stands behind the image, answers belong to it.
        """
        prompt, labels, image = call.prompt(), self.arguments.get("labels"), call.image
        assert image is not None
        if not isinstance(labels, Tensor) or call.past:
            return prompt
        learned = labels.to(image.device) != _NO_LABEL
        followed = learned.flip(1).cumsum(1).flip(1) > 0
        given = self._places(~learned & followed, False) | image
        behind = ~image & (image.flip(1).cumsum(1).flip(1) == 0)
        return torch.where((prompt & given & behind).any(1, keepdim=True), prompt & given, prompt)

    def _note_drafts(self, call: Call) -> None:
        """An assistant's guesses stand behind the prompt: it wants logits for its end and for them.

        What is dropped must not depend on them, or it would be other tokens than without them.
        """
        wanted = self.arguments.get("logits_to_keep")
        if isinstance(wanted, int) and 1 < wanted < call.tokens:
            call.drafts = wanted - 1

    # How many tokens go on follows from values, which torch.compile does not look at.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def select(self, call: Call, group: LayerGroup, rows: Tensor | None, hidden: Tensor) -> Tensor:
        """Let a group's last stage choose what goes on of its batch rows (None: all of them).

        What is left is noted in the call, a pass that has images. Returns what is about to enter
        the stage's layer: a copy where the selector changed some.
        """
        stage, earlier = group.stages[-1], call.has_dropped(group)
        if call.left is None:
            call.left = call.new_valid()
        if stage not in self.selectors:
            assert call.unwanted is not None
            call.left &= ~call.unwanted
        everyone = torch.arange(call.batch, device=hidden.device) if rows is None else rows
        pieces = self._pieces(call, stage, everyone) if stage in self.selectors else []
        for part, records in pieces:
            kept = call.kept.rows(part) if earlier and call.kept is not None else None
            inputs = self._inputs(call, self.selectors[stage], part, kept, hidden, records)
            selection = select_tokens(self.selectors[stage], inputs, stage.layer)
            keep = selection.keep
            if kept is not None:
                # Padding stands for tokens dropped before, which stay dropped.
                keep = torch.zeros_like(call.left[part]).scatter(1, kept.index, keep)
            if selection.hidden_states is not None:
                everything = kept or Kept.of(torch.ones_like(call.left[part]))
                hidden = scatter(hidden.clone(), part, everything, selection.hidden_states)
            call.left[part] &= keep
        assert call.image is not None
        call.kept = Kept.of(call.left)
        for layer in self.look_ahead.get(stage, ()):
            call.records.pop(layer, None)
        if self._renumbers(stage):
            gone = (call.new_valid() & ~call.left).cumsum(1)
            call.gaps = torch.zeros_like(gone) if call.gaps is None else call.gaps
            # A new tensor: layers remember parts of the one before.
            call.gaps = call.gaps.index_copy(0, everyone, gone[everyone])
        self.kept[stage.layer] = (call.left & call.image).sum(1)
        return hidden

    def _renumbers(self, stage: TokenStage) -> bool:
        selector: Selector | None = self.selectors.get(stage)
        if selector is None and self.vision is not None:
            selector = self.vision.selector
        return selector is not None and selector.renumbers

    def _pieces(
        self, call: Call, stage: TokenStage, rows: Tensor
    ) -> list[tuple[Tensor, list[Recorded]]]:
        """Rows that can be scored together, and by what: in every layer that scores them, one run
        of its attention block served them."""
        if not self.selectors[stage].needs & (Needs.QUERY_KEY | Needs.NEXT_QUERY_KEY):
            return [(rows, [])]
        copies = call.batch // len(self.program.plans)
        wanted, found = torch.zeros_like(rows), []
        for layer, samples in self.program.scored_by(stage).items():
            asked = torch.isin(rows // copies, torch.tensor(samples, device=rows.device))
            wanted += asked
            for record in call.records.get(layer, []):
                mine = asked
                if record.rows is not None:
                    mine = asked & torch.isin(rows, record.rows)
                found.append((mine, record))
        served = torch.stack([torch.zeros_like(rows), *(mine for mine, _ in found)])
        if (served.sum(0) != wanted).any():
            raise InputError(
                f"{stage.selector} scores tokens by the attention of a layer before layer "
                f"{stage.layer}, and this model's attention cannot be seen from outside"
            )
        kinds, kind_of = served[1:].unique(dim=1, return_inverse=True)
        return [
            (rows[kind_of == n], [record for is_by, (_, record) in zip(by, found) if is_by])
            for n, by in enumerate(kinds.T.tolist())
        ]

    def _inputs(
        self,
        call: Call,
        selector: DecoderSelector,
        rows: Tensor,
        kept: Kept | None,
        hidden: Tensor,
        records: list[Recorded],
    ) -> DecoderInputs:
        assert call.image is not None
        image, states = call.image[rows], hidden[rows]
        triton = with_triton(self.kernels, hidden.device)
        valid = call.new_valid()[rows]
        marks = call.marks[selector][rows] if selector in call.marks else None
        prompt = self._asked(call)[rows]
        if kept is not None:
            image, valid = gather(image, kept.index, -1) & kept.valid, kept.valid
            states = self.gather(states, kept.index)
            marks = None if marks is None else gather(marks, kept.index, -1) & valid
            prompt = gather(prompt, kept.index, -1) & valid
        normed = None
        if Needs.NORMED_STATES in selector.needs:
            normed = states if self._norm is None else self._norm(states)
        total = call.image if call.unwanted is None else call.image & ~call.unwanted
        total = total[rows].sum(1)
        inputs = DecoderInputs(
            image,
            valid,
            marks=marks,
            prompt=prompt,
            hidden_states=states,
            normed_states=normed,
            image_tokens=total,
            image_predictor=self._predictor(selector, hidden),
            chosen=None if self.chosen is None else self.chosen[rows],
            triton=triton,
        )
        if not records:
            return inputs
        scored = tuple(_attention(call, record, rows, kept) for record in records)
        last = scored[-1]
        return replace(
            inputs,
            valid=last.valid,
            query=last.query,
            key=last.key,
            rule=last.rule,
            attention_mask=last.mask,
            scored=scored,
        )

    def _predictor(self, selector: DecoderSelector, hidden: Tensor) -> ImagePredictor | None:
        """What a selector predicts with, where the hidden states are and in their type."""
        known = self._predictors.get(selector)
        return None if known is None else known.to(hidden.device, hidden.dtype)

    def gather(self, hidden: Tensor, index: Tensor) -> Tensor:
        """The hidden states of the tokens that are left: `Kept.index` of (rows, tokens, width)."""
        if with_triton(self.kernels, hidden.device):
            return GatherTokens(hidden, index).run(triton=True)
        return gather(hidden, index, -2)


def _attention(call: Call, record: Recorded, rows: Tensor, kept: Kept | None) -> LayerAttention:
    """What an attention block computed with for some rows of the batch, of tokens that are left."""
    own = rows if record.rows is None else torch.searchsorted(record.rows, rows)
    key = record.key[own]
    if record.valid is not None:
        valid = record.valid[own]
    elif call.valid is not None:
        # A sliding window holds the last keys only.
        valid = call.valid[rows][:, -key.shape[2] :]
    else:
        valid = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool)
    mask = record.mask
    if mask is not None:
        # Flash attention's masks say what is padding, which `valid` does too.
        mask = None if mask.ndim == 2 else mask[own] if mask.shape[0] > 1 else mask
    seen = LayerAttention(record.query[own], key, valid, mask, record.rule)
    if kept is None:
        return seen
    index = kept.index
    if record.places is not None:
        places = record.places[own]
        if torch.equal(places, index):
            return seen
        order = torch.arange(places.shape[1], device=places.device).expand_as(places)
        index = index.new_zeros(len(own), call.tokens).scatter(1, places, order).gather(1, index)
    return _narrowed(seen, index, kept.valid)


def _narrowed(seen: LayerAttention, index: Tensor, valid: Tensor) -> LayerAttention:
    """The same of fewer tokens: a stage has dropped others since, and no layer ran behind it.

    `index` and `valid`, shape (rows, left), as of `Kept`; keys of earlier passes stand before.
    """
    before = seen.key.shape[2] - seen.query.shape[2]
    earlier = torch.arange(before, device=index.device).expand(len(index), -1)
    columns = torch.cat([earlier, index + before], 1)
    mask = seen.mask
    if mask is not None:
        mask = mask.take_along_dim(index[:, None, :, None], 2)
        mask = mask.take_along_dim(columns[:, None, None, :], 3)
    return replace(
        seen,
        query=seen.query.take_along_dim(index[:, None, :, None], 2),
        key=seen.key.take_along_dim(columns[:, None, :, None], 2),
        valid=seen.valid.gather(1, columns)
        & torch.cat([torch.ones_like(earlier, dtype=torch.bool), valid], 1),
        mask=mask,
    )


def _image_predictor(selector: DynamicLLaVA, model: nn.Module) -> ImagePredictor:
    config: Any = model.config
    width = config.get_text_config(decoder=True).hidden_size
    predictor = load_predictors(selector.folder, width).image
    if predictor is None:
        raise InputError(f"the predictors in '{selector.folder}' have none of image tokens")
    return predictor
