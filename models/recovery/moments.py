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
from planner.models.calibration.replay import NOT_FINITE, last_logits
from planner.models.calibration.samples import Sample, drawn, together
from planner.models.running.bindings import BoundLayer, BoundSite


@dataclass(frozen=True, eq=False)
class Moments:
    """Averages at the sink of one site."""

    inputs: Tensor  # shape (features, features): mean of x x^T over tokens
    mean: Tensor  # shape (features,): mean of x
    # Shape (outputs, outputs): sum of g g^T over tokens of `GRADED` samples, divided by the number
    # of their answer tokens, where g is the gradient of the log-probability of an answer that the
    # model itself draws. An error e at the output then costs e^T gradients e / 2 nats per answer
    # token, to second order (the Fisher information).
    gradients: Tensor
    tokens: int  # how many `inputs` is the mean over

    def damped(self) -> Tensor:
        """`inputs` in float64 with the ridge on its diagonal.

        What least squares take for a relation among features that is none shrinks as tokens become
        more, and so does the ridge.
        """
        moment = self.inputs.double()
        least = torch.finfo(moment.dtype).tiny
        ridge = RIDGE * len(moment) / self.tokens * moment.diagonal().mean().clamp(min=least)
        return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


# The ridge as a share of the mean diagonal, where there is one token a feature.
RIDGE = 2.0
# Samples that gradients are taken of, and how many of the others run together.
GRADED, _ROWS = 96, 8


def narrowable(layers: Sequence[BoundLayer]) -> Iterator[BoundSite]:
    """Attention blocks and MLPs whose weights are plain matrices."""
    for layer in layers:
        for site in (layer.heads, layer.mlp):
            if site is not None and not site.obstacle:
                yield site


def multiplies_tiles(model: nn.Module) -> bool:
    """Whether the model is on a CPU that multiplies tiles of bfloat16, far quicker than float32."""
    device = next(model.parameters()).device
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def faster_products(model: nn.Module) -> Any:
    """Products of the model in bfloat16 where the CPU multiplies tiles of it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_tiles(model))


def site_moments(
    model: nn.Module,
    layers: Sequence[BoundLayer],
    samples: Sequence[Sample],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Moments]:
    """Moments of every narrowable site: a forward pass a sample, and a backward pass of some.

    Args:
        model: dense, in evaluation mode; left as it was.
        layers: its decoder layers.
        samples: some fifty tokens a feature make a good estimate.
        seed: of the answers that the model draws, and of which samples gradients are taken.
        progress: called with the number of samples done, and of all.

    Raises InputError: the model's output is not finite.
    """
    sites = list(narrowable(layers))
    sums = {site.site.name: _Sums(site) for site in sites}
    generator = torch.Generator().manual_seed(seed)
    numbers = range(len(samples))
    graded = drawn(numbers, GRADED, seed)
    others = [samples[number] for number in numbers if number not in graded]
    done = 0
    with _frozen(model), faster_products(model):
        for number in graded:
            _add(model, sites, sums, samples[number], generator)
            progress(done := done + 1, len(samples))
        for some in together(others, _ROWS):
            _add_inputs(model, sites, sums, some)
            progress(done := done + len(some.inputs["input_ids"]), len(samples))
    answers = sum(samples[number].answer for number in graded)
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
        rows = inputs.detach().flatten(0, -2)
        _add_products(self.inputs, rows)
        self.mean += rows.float().sum(0)
        self.tokens += len(rows)

    def add_gradients(self, gradient: Tensor) -> None:
        _add_products(self.gradients, gradient.flatten(0, -2))

    def means(self, answers: int) -> Moments:
        inputs, mean = self.inputs / self.tokens, self.mean / self.tokens
        return Moments(inputs, mean, self.gradients / answers, self.tokens)


@torch.no_grad()
def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows, summed in float32 whatever the model multiplies in."""
    onednn: Any = torch.backends.mkldnn
    before, numbers = onednn.matmul.fp32_precision, rows.float()
    # Products of numbers in bfloat16 are exact, so the CPU may multiply tiles of them.
    if rows.dtype == torch.bfloat16:
        onednn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast(rows.device.type, enabled=False):
            total.addmm_(numbers.T, numbers)
    finally:
        onednn.matmul.fp32_precision = before


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


def _add_inputs(
    model: Any, sites: Sequence[BoundSite], sums: dict[str, _Sums], some: Sample
) -> None:
    def watch(site: BoundSite) -> Callable[..., None]:
        return lambda module, inputs: sums[site.site.name].add_inputs(inputs[0])

    hooks = [site.sink.module.register_forward_pre_hook(watch(site)) for site in sites]
    try:
        with torch.no_grad():
            logits = model(**some.inputs, **last_logits(model, 1), use_cache=False).logits
        if not torch.isfinite(logits).all():
            raise InputError(NOT_FINITE)
    finally:
        for hook in hooks:
            hook.remove()


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
