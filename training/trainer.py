"""transformers.Trainer with the promises this project makes about long runs.

A run that was stopped goes on bit-exactly; a checkpoint appears whole or not at all; a loss that is
not a number stops the run and names the batch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME
from typing_extensions import override

from planner.ir.errors import InputError, PlannerError
from planner.training.config import RunConfig


def training_arguments(config: RunConfig, **options: Any) -> TrainingArguments:
    """transformers' arguments: a configuration's, with options of the run in place of them."""
    common: dict[str, Any] = {
        "output_dir": config.output_dir,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": 1.0,
        "use_cpu": not torch.accelerator.is_available(),
        "save_steps": config.save_steps,
        "save_total_limit": 3,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "dataloader_num_workers": config.dataloader_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": ["tensorboard"] if is_tensorboard_available() else [],
        "seed": config.seed,
        "data_seed": config.seed,
    }
    return TrainingArguments(**common | options)


class MuonAdamW(Optimizer):
    """Muon for the matrices inside of layers, AdamW for all other parameters, as one optimizer.

    Both move a weight by about the learning rate (`adjust_lr_fn`), so they share it. Muon is
    Keller Jordan's, as `torch.optim.Muon` computes it.

    `parameters`: by name; Muon's are the matrices with ``.layers.`` in their names. `weight_decay`:
    decoupled, of both.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in parameters:
            inside = ".layers." in name and name.endswith(".weight") and parameter.ndim == 2
            (matrices if inside else others).append(parameter)
        self.parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr, betas, weight_decay=weight_decay),
        )
        super().__init__([*matrices, *others], {})
        # The parts' own groups, which schedules change in place.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @override
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class RunTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose batches may carry `ids` (list of str), which name them in errors.

    If the model has a `tally`, shape (n,), the sum of all processes' tallies goes to its `summary`,
    which gives numbers to log beside the loss, and the tally starts at zero again.

    The losses of a step's batches are summed where they are divided by all tokens of the step, as
    stock models' are. Trainer takes any `forward` with keywords for one of those, so a model whose
    loss is a batch's own mean says ``accepts_loss_kwargs = False``.

    Args:
        rates: learning rates of parameters by what their names begin with.
        muon: train the matrices inside of layers by Muon.
        sampler: of all records of the run, in order; None for Trainer's.
    """

    _staging = False
    optimizer: Optimizer | None

    def __init__(
        self,
        *args: Any,
        rates: Mapping[str, float] = MappingProxyType({}),
        muon: bool = False,
        sampler: Sampler[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._rates, self._muon, self._sampler = rates, muon, sampler

    @override
    def _get_train_sampler(self, *args: Any) -> Sampler[int] | None:
        own: Sampler[int] | None = self._sampler or super()._get_train_sampler(*args)
        return own

    @override
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        mask = prepared.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            prepared["attention_mask"] = as_read(mask, self.model)
        return prepared

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        if self._rates:
            # Made here and not given to Trainer, since sharding replaces the parameters before.
            groups: dict[str, Any] = {"": {"params": []}}
            groups |= {start: {"params": [], "lr": rate} for start, rate in self._rates.items()}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    start = next((start for start in self._rates if name.startswith(start)), "")
                    groups[start]["params"].append(parameter)
            self.optimizer = AdamW(
                groups.values(),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
            )
        if self._muon:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            rate, decay = self.args.learning_rate, self.args.weight_decay
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonAdamW(trained, rate, decay, betas)
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        return optimizer

    def whole_state(self) -> dict[str, Tensor] | None:
        """All weights, gathered from processes that hold shards; None where there are no shards.

        All processes must call it; the main one gets the weights.
        """
        if not self.is_fsdp_enabled:
            return None
        return dict(self.accelerator.get_state_dict(self.model))

    def run(self) -> None:
        """Train to `max_steps` from the last checkpoint or the start; load a finished run."""
        checkpoint = last_checkpoint(self.args.output_dir)
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(checkpoint)
                return
        self.train(resume_from_checkpoint=checkpoint)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward; a NaN or infinite loss is an error before the weights change."""
        ids = inputs.pop("ids", None)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            named = f" of records {', '.join(ids)}" if ids else ""
            raise PlannerError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}, batch{named}; "
                "look at these records, or begin another run at a lower learning rate."
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer does, with the model's summary where there is one."""
        model = cast(Any, self.model)
        if "loss" in logs and hasattr(model, "tally"):
            tally = self.accelerator.reduce(model.tally.to(self.args.device), "sum")
            logs = logs | model.summary(tally)
            model.tally.zero_()
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        weights = Path(checkpoint) / SAFE_WEIGHTS_NAME
        if self._holds_a_model() and weights.is_file() and not self.is_fsdp_enabled:
            load_model(model, weights)
            return
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(checkpoint, model)
            return
        # Trainer matches names as they stand in the file, which differ from the module's for models
        # whose names transformers converts when it saves (LLaVA's decoder): it would warn and go on
        # with fresh weights. `from_pretrained` converts them back.
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    @override
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._holds_a_model():
            # Trainer writes the weights of other modules as they are, and tied ones twice, which
            # safetensors refuses.
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = _without_duplicates(state_dict)
        super()._save(output_dir, state_dict)

    def _holds_a_model(self) -> bool:
        """Whether what is trained is no stock model but holds one."""
        return not isinstance(self.model, PreTrainedModel) and not hasattr(
            self.model, "peft_config"
        )

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / "incomplete") if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Written aside, then renamed: killed while saving, a run keeps its previous checkpoint.
        final = Path(self._get_output_dir(trial))
        self._staging = True
        try:
            staging = Path(self._get_output_dir(trial))
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(final / name, ignore_errors=True)
            (staging / name).rename(final / name)
            staging.rmdir()
            rotate_checkpoints(str(final), self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()


def _without_duplicates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, those of several names under the first."""
    known: set[tuple[Any, ...]] = set()
    found = {}
    for name, value in state.items():
        place = (value.device, value.data_ptr(), value.shape, value.stride())
        if not value.numel() or place not in known:
            found[name] = value
        known.add(place)
    return found


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in an output folder, or None."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None


def as_read(mask: Tensor, model: nn.Module) -> Tensor:
    """A boolean mask as a model's attention reads it: attention that is written out adds masks.

    Raises InputError: it takes no masks of one's own, as flash attention does not.
    """
    stock = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    name = "sdpa" if stock is None else _text_attention(stock)
    if name.startswith(("flash", "paged", "flex")):
        raise InputError(
            f"a batch of conversations has a mask of its own, which {name} does not take: load the "
            "model with attn_implementation='sdpa'"
        )
    if name != "eager":
        return mask
    least = torch.finfo(torch.float32).min
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, least)


def _text_attention(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation or "eager")
