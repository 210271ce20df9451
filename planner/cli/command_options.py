"""Options that several commands share, each declared once, and how a command takes them.

A command names the fields of a `Request` that it lets users set; `command` gives it their options,
and calls it with the Request:

    @command("model", "budget", "tokens")
    def run_command(request: Request, console: Console, prompt: Prompt) -> None:
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from planner.ir.errors import InputError
from planner.planning.request import Request

if TYPE_CHECKING:
    from planner.models.calibration import Sample

# Fields of a Request whose options are called otherwise.
_CALLED = {
    "model": ("--model", "-m"),
    "budget": ("--budget", "-b"),
    "time_limit_seconds": ("--time-limit",),
}
# Fields that take more in Python than users write.
_WRITTEN: dict[str, Any] = {"budget": list[str] | None, "keep": str | None, "utilities": str}

# Fields of a Request that still say something where a scheduler makes the plans.
_BESIDE_A_SCHEDULER = (
    "model", "budget", "tokens", "device", "image_tokens", "text_tokens", "trust_remote_code",
)  # fmt: skip

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Budgets = Annotated[str, typer.Option(help="Fractions of the base model, by commas.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
KernelChoice = Annotated[
    str, typer.Option(help="Who computes: triton, torch, or auto, the faster.")
]
Split = Literal["train", "val", "test"]
Place = Annotated[str, typer.Option("--on", help="Where to run: cpu, cuda.")]
Convention = Annotated[
    Literal["planner", "llm-viewer", "dynamic-llava"],
    typer.Option(help="How costs are counted: exactly, or as published tables do."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Folder of a trained scheduler (or adallava-l, adallava-h, adallava-cost of "
        "tiny-llava): it makes a plan for every input.",
    ),
]
Recover = Annotated[
    str,
    typer.Option(help="Make up for what the plan removes: refit, by least squares, untrained."),
]
Images = Annotated[Path | None, typer.Option(help="Calibrate on this folder.")]
Text = Annotated[Path | None, typer.Option(help="Calibrate on this text file.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help='JSON lines {"image", "prompt", "answer"} for --images; answers may be left out.'
    ),
]


@dataclass(frozen=True)
class CalibrationData:
    """What weights are calibrated on."""

    images: Images = None
    text: Text = None
    samples: Annotated[
        int | None,
        typer.Option(
            help="Most samples to calibrate on [default: 64; of text for refit 768 passages]."
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.samples is not None and not self:
            raise InputError("--samples is of --images or --text: give one of them too")

    def __bool__(self) -> bool:
        return bool(self.images or self.text)

    def read(self, model: Any, processor: Any, recover: str) -> list[Sample]:
        """The samples for a recovery; InputError where there are none, or two kinds."""
        from planner.models.recovery.oneshot import read_inputs

        return read_inputs(model, processor, self.images, self.text, self.samples, recover=recover)


NewFolder = Annotated[Path, typer.Option("-o", "--output", help="New folder.")]
PlanFile = Annotated[Path, typer.Option(help="The plan file.")]
# As NumPy's generators take them.
MOST_SEED = 2**32 - 1
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the configuration; repeatable."),
]


def command(*names: str, **helps: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the command of a command line.

    A parameter whose type is a dataclass, such as `console`, is made of options that the fields
    declare; `request` of the fields that are named here. `helps`: field -> what its option means
    for this command, where that is something else.
    """

    def make(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = dict(inspect.signature(function).parameters)
        # In the help a Request's options come first, and those of all commands last.
        own.pop("request", None)
        own["console"] = own.pop("console")
        parameters = _request_parameters(names, helps)
        groups: dict[str, Any] = {}
        for name, parameter in own.items():
            if is_dataclass(hints[name]):
                groups[name] = hints[name]
                declared = get_type_hints(hints[name], include_extras=True)
                parts = fields(groups[name])
                parameters += [_parameter(f.name, declared[f.name], f.default) for f in parts]
            else:
                parameters.append(_parameter(name, hints[name], parameter.default))

        def run(**values: Any) -> None:
            given = {
                name: group(**{field.name: values.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            if names:
                chosen = {name: values.pop(name) for name in names}
                given["request"] = Request(**{n: v for n, v in chosen.items() if v is not None})
            return function(**given, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__doc__ = function.__doc__
        return run

    return make


def _request_parameters(
    names: Collection[str], helps: Mapping[str, str]
) -> list[inspect.Parameter]:
    """Fields of a Request; one that is None, and not given, leaves the Request's own default."""
    hints = get_type_hints(Request, include_extras=True)
    parameters = []
    for field in fields(Request):
        name, default = field.name, field.default
        if name in names:
            kind, said = get_args(hints[name])
            option = typer.Option(*_called(name), help=helps.get(name, said))
            default = None if name in ("budget", "keep") else default
            annotation: Any = Annotated[_WRITTEN.get(name, kind), option]
            parameters.append(_parameter(name, annotation, default))
    return parameters


def _called(name: str) -> tuple[str, ...]:
    """The option of a field of a Request, first by its whole name."""
    return _CALLED.get(name, (f"--{name.replace('_', '-')}",))


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def check_beside_scheduler(request: Request, *used: str) -> None:
    """Raise InputError where what a scheduler decides was asked for; `used`: fields that do count
    besides."""
    refuse_unused(request, "--scheduler makes plans itself", (*_BESIDE_A_SCHEDULER, *used))


def refuse_unused(request: Request, beside: str, used: Collection[str]) -> None:
    """Raise InputError where a user set a field of a Request that has no meaning there.

    `beside`: the option that leaves it without one, and why, for the message.
    """
    unused = [
        _called(field.name)[0]
        for field in fields(Request)
        if field.name not in used and getattr(request, field.name) != field.default
    ]
    if unused:
        raise InputError(f"{beside}: leave out {', '.join(unused)}")


def parse_fractions(text: str) -> list[float]:
    """Fractions separated by commas; InputError where they are none."""
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--budgets '{text}' is not a list such as 0.5,0.65,1") from None
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise InputError(f"budget '{fraction:g}' must be more than 0 and at most 1")
    return fractions
