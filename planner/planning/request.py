"""What to compile, as users ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from planner.ir.cost.workload import DEFAULT_NEW_TOKENS, DEFAULT_TEXT_TOKENS, Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.planning.budgets import Budget

# What a fraction is of: everything, or the decoder and lm_head alone.
SCOPES = ("model", "llm")
# Type of an option -> what is taken for it.
_ACCEPTED: Mapping[Any, Any] = {
    int: Integral,
    float: Real,
    int | None: Integral | None,
    str | tuple[str, ...]: str | tuple,
}


@dataclass(frozen=True)
class Request:
    """What to compile. Fields are the options of ``planner compile``, with what it says of them.

    Utilities ``auto`` are the file that lies beside a model's weights, else ``prior``; who holds
    the weights measures instead, and knows ``magnitude`` besides (`planner.models.recovery`).
    InputError where an option is of another type, or out of its range whatever the model.
    """

    model: Annotated[str, "Alias, local folder with a config, or hub id."]
    budget: Annotated[
        Any,
        "Fraction of the base (0.65) or limit (kv=256MiB, latency=49ms); repeatable "
        "[default: 0.65].",
    ] = 0.65
    switches: Annotated[str, "Axes: tokens,layers,heads,mlp; or all, adallava-l, adallava-h."] = (
        "all"
    )
    tokens: Annotated[str | None, "A token selector, such as fastv:k=2,r=0.5."] = None
    kv: Annotated[str | None, "What the KV cache holds, such as h2o:heavy=0.2,recent=0.2."] = None
    utilities: Annotated[
        str | Path,
        "auto (measured, where weights are loaded), magnitude (weight norms), prior, uniform, or "
        "an .npz file.",
    ] = "auto"
    device: Annotated[
        str | None, "For latency: see planner devices, or a file of planner calibrate."
    ] = None
    scope: Annotated[str | None, "What a fraction is of: model, or llm [default: model]."] = None
    image_tokens: Annotated[int | None, "Visual tokens a sample [default: one image]."] = None
    text_tokens: Annotated[int, "Prompt tokens besides them."] = DEFAULT_TEXT_TOKENS
    new_tokens: Annotated[int, "Generated tokens, for KV bytes."] = DEFAULT_NEW_TOKENS
    batch: Annotated[int, "Samples that run together."] = 1
    mlp_groups: Annotated[int | None, "Groups an MLP is divided into."] = None
    keep: Annotated[str | tuple[str, ...], "What stays whole, such as layer.0,heads.3."] = ()
    uniform: Annotated[bool, "Equal widths in all layers, as a plain export needs."] = False
    time_limit_seconds: Annotated[float, "Seconds the solver may take."] = 60.0
    trust_remote_code: Annotated[bool, "Run code that comes with the model."] = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Request).items():
            value: Any = getattr(self, name)
            accepted = _ACCEPTED.get(kind, kind)
            mistaken = isinstance(value, bool) and kind is not bool
            if kind is not Any and (mistaken or not isinstance(value, accepted)):
                wanted = getattr(kind, "__name__", str(kind))
                raise InputError(f"{name.replace('_', '-')} is {value!r:.60}: it must be {wanted}")
        if self.mlp_groups is not None and self.mlp_groups < 1:
            raise InputError(f"mlp-groups must be at least 1, not {self.mlp_groups}")
        if not self.time_limit_seconds > 0:
            raise InputError(
                f"the time limit must be more than 0 seconds, not {self.time_limit_seconds}"
            )
        if self.scope is not None and self.scope not in SCOPES:
            raise InputError(f"unknown scope '{self.scope}': choose model or llm")

    def limits(self) -> Budget:
        """The budget; InputError where it is none, or limits seconds on no device."""
        budget = Budget.of(self.budget)
        if self.device is None and any(limit.metric == "latency" for limit in budget.limits):
            raise InputError(
                "a latency budget needs --device (device=... in Python): seconds mean nothing "
                "without one"
            )
        return budget

    def workload(self, graph: Graph) -> Workload:
        """What a model with this Graph is priced for."""
        return Workload.default(
            graph, self.image_tokens, self.text_tokens, self.new_tokens, self.batch
        )
