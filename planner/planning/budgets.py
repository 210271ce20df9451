"""Budgets: what the user asks for, as limits on metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from planner.ir.errors import InputError, check_known

# metric -> what a user means by it
METRICS: Mapping[str, str] = {
    "flops": "floating-point operations of the prefill",
    "latency": "seconds of the prefill (time to first token), modelled or measured on a device",
    "kv": "bytes of keys and values once all tokens are generated",
    "memory": "peak bytes of the exported plan: weights kept, keys and values, and activations",
}
_ONE = Fraction(1)
_UNITS: Mapping[str, Mapping[str, Fraction]] = {
    "flops": {
        "": _ONE, "FLOP": _ONE, "FLOPs": _ONE, "KFLOP": _ONE * 10**3, "MFLOP": _ONE * 10**6,
        "GFLOP": _ONE * 10**9, "TFLOP": _ONE * 10**12, "PFLOP": _ONE * 10**15,
        "G": _ONE * 10**9, "T": _ONE * 10**12, "P": _ONE * 10**15,
    },
    "latency": {"s": _ONE, "ms": _ONE / 10**3, "us": _ONE / 10**6, "µs": _ONE / 10**6},
    "kv": {
        "B": _ONE, "kB": _ONE * 10**3, "KB": _ONE * 10**3, "MB": _ONE * 10**6, "GB": _ONE * 10**9,
        "KiB": _ONE * 2**10, "MiB": _ONE * 2**20, "GiB": _ONE * 2**30,
    },
}  # fmt: skip
# ``flops=2e12`` is an amount; below this a number without a unit can just be a mistaken fraction.
_FEWEST_FLOPS = 1000
# More FLOPs, seconds or bytes than anything has; a mistake, which printed would be mere digits.
_BEYOND = 10**90
# Of so many digits, since `Fraction` works out every one of 1e99999999.
_QUANTITY = re.compile(
    r"\s*([+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][+-]?\d{1,2})?)\s*([A-Za-zµ%]*)\s*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: a fraction of the base model's cost, or an amount of FLOPs, seconds or bytes."""

    metric: str
    value: Fraction
    of_base: bool

    @staticmethod
    def parse(text: str) -> Limit:
        """Read ``0.65``, ``65%``, ``kv=256MiB``, ``latency=49ms`` or ``flops=5.5TFLOP``."""
        metric, equals, quantity = text.partition("=")
        if not equals:
            metric, quantity = "flops", text
        metric = metric.strip()
        check_known("metric of a budget", metric, METRICS)
        match = _QUANTITY.fullmatch(quantity)
        units = _UNITS["kv" if metric == "memory" else metric]
        if match is None or (match[2] not in units and match[2] not in ("", "%")):
            known = ", ".join(unit for unit in units if unit)
            raise InputError(
                f"budget '{text:.80}' is not an amount of {metric}: "
                f"give a fraction such as 0.65 or a number with one of {known}"
            )
        value, unit = Fraction(match[1]), match[2]
        absolute = unit not in ("", "%") or (
            equals and metric == "flops" and value >= _FEWEST_FLOPS
        )
        if absolute and 0 < value * units[unit] < _BEYOND:
            return Limit(metric, value * units[unit], of_base=False)
        if unit == "%":
            value /= 100
        if absolute or not 0 < value <= 1:
            raise InputError(
                f"budget '{text:.80}' must be more than 0 and at most 1 of the base model"
            )
        return Limit(metric, value, of_base=True)

    def __str__(self) -> str:
        return f"{self.metric}={float(self.value):.12g}"


@dataclass(frozen=True, slots=True)
class Budget:
    """One or several limits, at most one per metric."""

    limits: tuple[Limit, ...]

    @staticmethod
    def of(value: Any) -> Budget:
        """From a Budget, a number, a text, a mapping of metrics or a sequence of texts."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or value is None:
            raise InputError(f"budget {value!r} is not a number such as 0.65")
        if isinstance(value, Mapping):
            return Budget.of([f"{metric}={_said(amount)}" for metric, amount in value.items()])
        if isinstance(value, int | float):
            if not 0 < value <= 1:
                raise InputError(
                    f"budget '{_said(value)}' must be more than 0 and at most 1 of the base model"
                )
            return Budget((Limit("flops", Fraction(str(value)), of_base=True),))
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray) or not value:
            raise InputError(f"budget {value!r:.80} is not a number such as 0.65")
        limits = tuple(Limit.parse(_said(text)) for text in value)
        metrics = [limit.metric for limit in limits]
        for metric in metrics:
            if metrics.count(metric) > 1:
                raise InputError(f"the budget limits {metric} twice")
        return Budget(limits)

    def describe(self) -> dict[str, str]:
        """Metric -> limit as text, for plans and messages."""
        return {
            limit.metric: f"{float(limit.value):.12g} "
            + ("of base" if limit.of_base else _BASE_UNITS[limit.metric])
            for limit in self.limits
        }


def _said(value: Any) -> str:
    """A value as users would write it; Python prints no integer of thousands of digits."""
    try:
        return str(value)
    except ValueError:
        return "a number of thousands of digits"


_BASE_UNITS = {"flops": "FLOP", "latency": "s", "kv": "B", "memory": "B"}
