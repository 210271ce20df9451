"""What a calibration pass says about the sites of a model.

A site ends in one linear that sums over its lanes (o_proj, down_proj): the sink. Narrowing the site
removes input features of that linear. How its inputs vary together says what the features that stay
can still say of those that go; gradients at its output say what an error there costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner.ir.errors import InputError
from planner.models.calibration.replay import NOT_FINITE
from planner.models.calibration.samples import Sample
from planner.models.running.bindings import BoundLayer, BoundSite


@dataclass(frozen=True, eq=False)
class Moments:
    """Averages at the sink of one site.

    Attributes:
        inputs: shape (features, features): mean of x x^T over tokens.
        mean: shape (features,): mean of x.
        gradients: shape (outputs, outputs): sum of g g^T over tokens, divided by the number of
            answer tokens, where g is the gradient of the log-probability of an answer that the
            model itself draws. An error e at the output then costs e^T gradients e / 2 nats per
            answer token, to second order (the Fisher information).
    """

    inputs: Tensor
    mean: Tensor
    gradients: Tensor


# lambda, as a share of the mean diagonal.
RIDGE = 0.01


def damped(moment: Tensor) -> Tensor:
    """A second moment in float64 with the ridge on its diagonal."""
    moment = moment.double()
    ridge = RIDGE * moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def narrowable(layers: Sequence[BoundLayer]) -> Iterator[BoundSite]:
    """Attention blocks and MLPs whose weights are plain matrices."""
    for layer in layers:
        for site in (layer.heads, layer.mlp):
            if site is not None and not site.obstacle:
                yield site


def faster_products(model: nn.Module) -> Any:
    """Products of the model in bfloat16 where the CPU multiplies tiles of it: far quicker."""
    device = next(model.parameters()).device
    tiles = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=tiles)


def site_moments(
    model: nn.Module,
    layers: Sequence[BoundLayer],
    samples: Sequence[Sample],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Moments]:
    """Moments of every narrowable site: a forward and a backward pass a sample.

    Args:
        model: dense, in evaluation mode; left as it was.
        layers: its decoder layers.
        samples: some ten tokens a feature make a good estimate.
        seed: of the answers that the model draws.
        progress: called with the number of samples done, and of all.

    Raises:
        InputError: the model's output is not finite.
    """
    sites = list(narrowable(layers))
    sums = {site.site.name: _Sums(site) for site in sites}
    generator = torch.Generator().manual_seed(seed)
    with _frozen(model), faster_products(model):
        for done, sample in enumerate(samples, 1):
            _add(model, sites, sums, sample, generator)
            progress(done, len(samples))
    answers = sum(sample.answer for sample in samples)
    return {name: total.means(answers) for name, total in sums.items()}


class _Sums:
    """Sums at one sink."""

    def __init__(self, site: BoundSite) -> None:
        outputs, features = site.sink.weight.shape
        device = site.sink.weight.device
        self.inputs = torch.zeros(features, features, device=device)
        self.mean = torch.zeros(features, device=device)
        self.gradients = torch.zeros(outputs, outputs, device=device)
        self.tokens = 0

    def add_inputs(self, inputs: Tensor) -> None:
        rows = inputs.detach().flatten(0, -2).float()
        _add_products(self.inputs, rows)
        self.mean += rows.sum(0)
        self.tokens += len(rows)

    def add_gradients(self, gradient: Tensor) -> None:
        _add_products(self.gradients, gradient.flatten(0, -2).float())

    def means(self, answers: int) -> Moments:
        return Moments(self.inputs / self.tokens, self.mean / self.tokens, self.gradients / answers)


@torch.no_grad()
def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows, in float32 whatever the model multiplies in."""
    with torch.autocast(rows.device.type, enabled=False):
        total.addmm_(rows.T, rows)


def _add(
    model: Any,
    sites: Sequence[BoundSite],
    sums: dict[str, _Sums],
    sample: Sample,
    generator: torch.Generator,
) -> None:
    outputs: dict[str, Tensor] = {}

    def watch(site: BoundSite) -> Callable[..., Tensor]:
        name = site.site.name

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            sums[name].add_inputs(inputs[0])
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            outputs[name] = output
            return output

        return hook

    hooks = [site.sink.module.register_forward_hook(watch(site)) for site in sites]
    try:
        with torch.enable_grad():
            logits = model(**sample.inputs, use_cache=False).logits
            answer = logits[:, -sample.answer - 1 : -1].float().log_softmax(-1)
            if not torch.isfinite(answer).all():
                raise InputError(NOT_FINITE)
            chances = answer.detach().exp().flatten(0, 1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator).to(answer.device)
            score = answer.flatten(0, 1).gather(1, drawn).sum()
            gradients = torch.autograd.grad(score, list(outputs.values()))
    finally:
        for hook in hooks:
            hook.remove()
    for name, gradient in zip(outputs, gradients, strict=True):
        sums[name].add_gradients(gradient)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters, which nobody reads here."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
