"""Configurations: a YAML file checked against a pydantic schema, with `key=value` overrides."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from planner.documents import parse_yaml, read_yaml
from planner.ir.errors import InputError
from planner.training.data.conversations import FAMILY_WEIGHTS

# Folder of the configurations that planner comes with.
CONFIGS = Path(__file__).parent / "configs"

_MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=_MOST)]  # 0 for none
# As NumPy's generators take them.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # of learning
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Memory = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # of a moving average


def _odds(weights: dict[str, float]) -> dict[str, float]:
    if unknown := set(weights) - set(FAMILY_WEIGHTS):
        raise ValueError(f'unknown family "{min(unknown)}"; known: {", ".join(FAMILY_WEIGHTS)}')
    if not 0 < sum(weights.values()) < math.inf:
        raise ValueError("some family must have a weight above 0, and their sum be finite")
    return weights


FamilyWeights = Annotated[dict[str, Weight], AfterValidator(_odds)]


class RunConfig(BaseModel):
    """What every training run has; immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    output_dir: str = Field(min_length=1)
    export_dir: str | None = Field(default=None, min_length=1)
    seed: Seed = 0

    # Of rendered scenes: how many there are, and what their questions are about.
    scenes: Count = 1_000_000
    description_share: Share
    family_weights: FamilyWeights = FAMILY_WEIGHTS
    max_text_tokens: Count = 110

    max_steps: Count
    batch_size: Count = 32
    learning_rate: Rate
    weight_decay: Weight = 0.0
    adam_beta2: Memory = 0.999
    save_steps: Count = 200
    logging_steps: Count = 20
    dataloader_workers: CountOrNone = 0

    @property
    def made(self) -> tuple[Path, ...]:
        """Folders that are written when training is done."""
        return () if self.export_dir is None else (Path(self.export_dir),)


C = TypeVar("C", bound=RunConfig)


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply overrides such as ``"learning_rate=1e-3"`` (values are YAML).

    Raises InputError: there is no such file, or it does not hold keys and values.
    """
    path = Path(path)
    values = read_yaml(path, "configuration") or {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}.")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f'"--set {override}" should be "--set key=value".')
        values[key.strip()] = parse_yaml(value, f"the value of {key.strip()}")
    return values


def parse_config(schema: type[C], values: Mapping[str, Any], source: str) -> C:
    """Check values against a schema; the first thing wrong becomes one sentence."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] != "extra_forbidden":
            said = problem["msg"].removeprefix("Value error, ")
            raise InputError(f'{source}: "{key}": {said} (found {problem["input"]!r}).') from None
        near = difflib.get_close_matches(key, schema.model_fields, n=1)
        known = ", ".join(schema.model_fields)
        hint = f'did you mean "{near[0]}"?' if near else f"known: {known}."
        raise InputError(f'{source}: unknown key "{key}"; {hint}') from None
