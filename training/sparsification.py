"""Dynamic-LLaVA: predictors of tokens worth keeping, trained with their model (arXiv 2412.00876).

    planner train training/configs/dynamic-llava.yaml [--set learning_rate=1e-4 ...]

Predictors see what enters a layer. From there on, tokens that they would drop are hidden as keys
from all others by a masked softmax; all are computed, and the loss is on all. Gradients reach the
predictors through hard Gumbel-softmax samples, straight through. The result is a folder with a
checkpoint that stock transformers loads, its processor, and the predictors, which
``--tokens dynamic-llava:FOLDER`` and ``--kv dynamic-llava:FOLDER`` run.

As in the released code: the penalty on keep rates is squared, "keep" is the first logit, the
projector is trained. Its softmax adds 1e-6 / n to every weight, the paper's (equation 7) and this
one nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax
from transformers import TrainerCallback, set_seed
from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.prompts import is_visual
from planner.models.tokens.predictors import Predictors, save_predictors
from planner.models.tokens.selectors.scoring import pack
from planner.planning.selectors import PredictorSettings
from planner.training.adallava import last_answer
from planner.training.config import Rate
from planner.training.conversation_runs import (
    ConversationConfig,
    TurnsCollator,
    arguments_of,
    conversations_of,
    export_model,
    load_base,
)
from planner.training.data import Packer
from planner.training.data.packing import IGNORE
from planner.training.run_folders import begun, exporting
from planner.training.trainer import RunTrainer

# What the temperature falls to, from 1.
_LAST_TEMPERATURE = 0.1


class DynamicLlavaConfig(ConversationConfig):
    """Everything that makes one Dynamic-LLaVA model."""

    recipe: str = "dynamic-llava"
    # Of the predictors; what is silent is as published.
    predictors: dict[str, Any] = {}
    learning_rate: Rate = 5e-6
    predictor_learning_rate: Rate = 2e-4
    # Train the predictors alone, and write nothing else.
    freeze_model: bool = False

    @model_validator(mode="after")
    def _predictors_fit(self) -> Self:
        PredictorSettings.of(self.predictors, "predictors")
        return self


class SparseModel(nn.Module):
    """A stock model and its predictors as one module to train, under masks.

    Attributes:
        temperature: of the Gumbel-softmax; falls from 1 to 0.1 in the course of a run.
        tally: since the last log: pictures' keep rates summed, how many pictures, and the same of
            long answers; shape (4,).
    """

    # As the authors' code, which takes the mean of each batch, on every device.
    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(self, model: nn.Module, graph: Graph, predictors: Predictors) -> None:
        super().__init__()
        self.model, self.predictors = model, predictors
        self.temperature = 1.0
        self.tally = torch.zeros(4, dtype=torch.float64)
        self._image = self._answer = torch.empty(0)
        self._penalty = torch.zeros(())
        layer = predictors.settings.sparse_layer
        if layer >= graph.layers:
            raise InputError(f"sparse_layer {layer}: the model has {graph.layers} layers")
        # Masks stay between forward and backward passes, which may run layers again.
        self._masks = ExitStack()
        gates = Gates(tokens={layer: self._gates})
        self._masks.enter_context(MaskedExecutor(model, graph).using(gates))

    def detach(self) -> None:
        """Give the model back as it was."""
        self._masks.close()

    def forward(self, labels: Tensor, **inputs: Any) -> Any:
        """The stock model's output; its loss has the penalty on keep rates in it.

        `labels`: shape (batch, tokens); of several answers the last is sparsified. `inputs`: the
        model's other arguments.
        """
        self._image = is_visual(inputs["input_ids"], self.model)
        places = torch.arange(labels.shape[1], device=labels.device)
        answered = (labels != IGNORE) & (places >= last_answer(labels)[:, None])
        long = answered.sum(1) >= self.predictors.settings.output_text_len_for_training
        self._answer = answered & long[:, None]
        output = self.model(**inputs, labels=labels, use_cache=False)
        output.loss = output.loss + self._penalty
        return output

    def _gates(self, hidden: Tensor) -> Tensor:
        """Samples of which tokens are kept, (batch, tokens) of 0 and 1, for what enters a layer."""
        settings, gates = self.predictors.settings, torch.ones_like(hidden[..., 0])
        penalty = hidden.new_zeros(len(hidden))
        if self.predictors.image is not None and self._image.any():
            where, valid = pack(self._image, "right")
            states = hidden.take_along_dim(where[..., None], 1)
            kept = self._drawn(self.predictors.image(states, valid))
            gates = gates.scatter(1, where, torch.where(valid, kept, 1))
            penalty = penalty + self._missed(gates, self._image, settings.vision_keep_rate, 0)
        if self.predictors.output is not None and self._answer.any():
            kept = self._drawn(self.predictors.output(hidden))
            gates = torch.where(self._answer, kept, gates)
            penalty = penalty + self._missed(gates, self._answer, settings.output_text_keep_rate, 2)
        # Samples without a picture, and short answers, add nothing and count in the mean.
        self._penalty = settings.mask_loss_weight * penalty.mean()
        return gates

    def _drawn(self, logits: Tensor) -> Tensor:
        """Hard samples of "keep" for logits (..., 2), with a gradient."""
        chances = logits.float().log_softmax(-1)
        return gumbel_softmax(chances, self.temperature, hard=True)[..., 0].to(logits.dtype)

    def _missed(self, gates: Tensor, tokens: Tensor, rate: float, place: int) -> Tensor:
        """How far the share kept of some tokens is from a rate, squared, by sample."""
        there = tokens.any(1)
        shares = (gates * tokens).sum(1) / tokens.sum(1).clamp(min=1)
        self.tally[place] += shares.detach().double().sum().cpu()
        self.tally[place + 1] += int(there.sum())
        return (shares - rate) ** 2 * there

    def summary(self, tally: Tensor) -> dict[str, float]:
        """Numbers to log of a tally: mean keep rates."""
        images, pictures, answers, long = tally.tolist()
        return {"image_kept": images / max(pictures, 1), "answer_kept": answers / max(long, 1)}


class _Cooling(TrainerCallback):  # type: ignore[misc]
    """Sets the temperature before every step."""

    def __init__(self, sparse: SparseModel) -> None:
        self.sparse = sparse

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sparse.temperature = _LAST_TEMPERATURE ** (state.global_step / state.max_steps)


def train(config: DynamicLlavaConfig) -> SparseModel:
    """Train, or go on from the last checkpoint; export where `export_dir` is set."""
    with begun(config):
        trainer, sparse, processor = build_trainer(config)
        trainer.run()
    gathered = trainer.whole_state()
    sparse.detach()
    if config.export_dir is not None and trainer.args.should_save:
        if gathered is not None:
            # What was trained holds shards.
            sparse, _ = _build(config)
            sparse.load_state_dict(gathered)
            sparse.detach()
        beside = partial(
            save_predictors, sparse.predictors.half() if config.export_half else sparse.predictors
        )
        if config.freeze_model:
            with exporting(Path(config.export_dir), config) as folder:
                beside(folder)
        else:
            export_model(sparse.model, processor, config, beside)
    return sparse


def build_trainer(config: DynamicLlavaConfig) -> tuple[RunTrainer, SparseModel, Any]:
    """(trainer ready to start or resume, what it trains, processor)."""
    set_seed(config.seed)
    sparse, processor = _build(config)
    packer = Packer(processor, config.max_text_tokens, dialogue_share=1.0)
    trainer = RunTrainer(
        model=sparse,
        args=arguments_of(config),
        train_dataset=conversations_of(config, images_only=True),
        data_collator=TurnsCollator(packer, config.seed, config.turns),
        processing_class=processor,
        callbacks=[_Cooling(sparse)],
        rates={"predictors.": config.predictor_learning_rate},
    )
    return trainer, sparse, processor


def _build(config: DynamicLlavaConfig) -> tuple[SparseModel, Any]:
    model, processor, name = load_base(config)
    if config.freeze_model:
        model.requires_grad_(False)
    graph = lower_model(model, name)
    settings = PredictorSettings.of(config.predictors, "predictors")
    predictors = Predictors(int(graph.properties["hidden_size"]), settings).to(model.dtype)
    return SparseModel(model, graph, predictors), processor
