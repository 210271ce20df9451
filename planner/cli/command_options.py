"""Options that several commands share, each declared once, and how a command takes them.

A command names the fields of a `Request` that it lets users set; `command` gives it their options,
and calls it with the Request:

    @command("model", "budget", "tokens")
    def run_command(request: Request, console: Console, prompt: Prompt) -> None:
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from planner.cli.console import Console

if TYPE_CHECKING:
    from planner.planning.compiler import Request as Request
else:
    # It comes with the solvers, and is imported once one is made.
    Request = Any

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


@dataclass(frozen=True)
class RequestOptions:
    """The options of what to compile: those of `planner.planning.compiler.Request`, by its names.

    One that is None, and not given by the user, leaves the Request's own default.
    """

    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, local folder with a config, or hub id.")
    ]
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            help="Fraction of the base (0.65) or limit (kv=256MiB, latency=49ms); repeatable "
            "[default: 0.65].",
        ),
    ] = None
    switches: Annotated[
        str,
        typer.Option(
            "--switches", help="Axes: tokens,layers,heads,mlp; or all, adallava-l, adallava-h."
        ),
    ] = "all"
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="A token selector, such as fastv:k=2,r=0.5.")
    ] = None
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="What the KV cache holds, such as h2o:heavy=0.2,recent=0.2."),
    ] = None
    utilities: Annotated[
        str,
        typer.Option(
            "--utilities",
            help="auto (measured, where weights are loaded), magnitude (weight norms), prior, "
            "uniform, or an .npz file.",
        ),
    ] = "auto"
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="For latency: see planner devices, or a file of planner calibrate."
        ),
    ] = None
    scope: Annotated[
        str | None,
        typer.Option("--scope", help="What a fraction is of: model, or llm [default: model]."),
    ] = None
    image_tokens: Annotated[
        int | None,
        typer.Option("--image-tokens", help="Visual tokens a sample [default: one image]."),
    ] = None
    text_tokens: Annotated[
        int, typer.Option("--text-tokens", help="Prompt tokens besides them.")
    ] = 64
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Generated tokens, for KV bytes.")
    ] = 64
    batch: Annotated[int, typer.Option("--batch", help="Samples that run together.")] = 1
    mlp_groups: Annotated[
        int | None, typer.Option("--mlp-groups", help="Groups an MLP is divided into.")
    ] = None
    keep: Annotated[
        str | None, typer.Option("--keep", help="What stays whole, such as layer.0,heads.3.")
    ] = None
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="Equal widths in all layers, as a plain export needs."),
    ] = False
    time_limit_seconds: Annotated[
        float, typer.Option("--time-limit", help="Seconds the solver may take.")
    ] = 60.0
    trust_remote_code: TrustRemoteCode = False


Budgets = Annotated[str, typer.Option("--budgets", help="Fractions of the base model, by commas.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
KernelChoice = Annotated[
    str, typer.Option("--kernels", help="Who computes: triton, torch, or auto, the faster.")
]
Split = Literal["train", "val", "test"]
Place = Annotated[str, typer.Option("--on", help="Where to run: cpu, cuda.")]
Convention = Annotated[
    Literal["planner", "llm-viewer", "dynamic-llava"],
    typer.Option("--convention", help="How costs are counted: exactly, or as published tables do."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Folder of a trained scheduler (or adallava-l, adallava-h, adallava-cost of "
        "tiny-llava): it makes a plan for every input.",
    ),
]


Recover = Annotated[
    str,
    typer.Option(
        "--recover", help="Make up for what the plan removes: refit, by least squares, untrained."
    ),
]
Images = Annotated[Path | None, typer.Option("--images", help="Calibrate on this folder.")]
Text = Annotated[Path | None, typer.Option("--text", help="Calibrate on this text file.")]
Samples = Annotated[int, typer.Option("--samples", help="Most samples to calibrate on.")]


def command(*names: str, **helps: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the command of a command line.

    Besides its own parameters it takes `console`, and `request` where it names fields of one.

    Args:
        names: fields of `RequestOptions` that become its options, the model among them.
        helps: field -> what its option means for this command, where that is something else.
    """

    def make(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        parameters = _parameters(RequestOptions, names, helps)
        for name, own in inspect.signature(function).parameters.items():
            if name not in ("request", "console"):
                parameters.append(own.replace(annotation=hints[name], kind=own.KEYWORD_ONLY))
        parameters += _parameters(Console)

        def run(**values: Any) -> None:
            own = {name: value for name, value in values.items() if name in hints}
            console = Console(**{field.name: values[field.name] for field in fields(Console)})
            if not names:
                return function(console=console, **own)
            from planner.planning.compiler import Request

            given = {name: values[name] for name in names if values[name] is not None}
            return function(request=Request(**given), console=console, **own)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__doc__ = function.__doc__
        return run

    return make


def _parameters(
    options: type, names: Collection[str] | None = None, helps: Mapping[str, str] | None = None
) -> list[inspect.Parameter]:
    """Fields of a dataclass of options as parameters; all of them where `names` is None."""
    hints = get_type_hints(options, include_extras=True)
    parameters = []
    for field in fields(options):
        if names is not None and field.name not in names:
            continue
        kind, option = get_args(hints[field.name])
        if helps and field.name in helps:
            option = typer.Option(*option.param_decls, help=helps[field.name])
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, option],
            )
        )
    return parameters


def parse_fractions(text: str) -> list[float]:
    """Fractions separated by commas; InputError where they are none."""
    from planner.ir.errors import InputError

    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--budgets '{text}' is not a list such as 0.5,0.65,1") from None
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise InputError(f"budget '{fraction:g}' must be more than 0 and at most 1")
    return fractions
