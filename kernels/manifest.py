"""The record of a plan's compiled kernels: ``kernels/manifest.json`` beside the plan.

One row per kernel and target, with what the compiler made of it and what the cost model expects.
Reading needs neither torch nor Triton.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.ir.errors import InputError
from planner.plan import load_plan

__all__ = ["FOLDER", "NAME", "CompiledKernel", "Manifest", "read_manifest"]

FORMAT = 1
FOLDER, NAME = "kernels", "manifest.json"


class CompiledKernel(BaseModel):
    """One kernel for one target.

    Attributes:
        kernel: function in the source.
        target: ``sm_90``.
        source, cubin: paths inside the folder.
        cubin_sha256: of the machine code.
        block: what it is part of, for people.
        phase: ``prefill`` or ``decode``.
        layers: that run it, as ranges.
        batch, tokens: that it is tiled and predicted for.
        registers: per thread.
        spill_bytes: per thread.
        shared_bytes: per program.
        mma, wgmma: tensor-core instructions in the code.
        warps, stages: of a launch.
        tile: block sizes by name.
        predicted_us: microseconds by the cost model; nothing was timed.
    """

    model_config = ConfigDict(extra="forbid")
    kernel: str
    target: str
    source: str
    cubin: str
    cubin_sha256: str
    block: str
    phase: str
    layers: str
    batch: int = Field(gt=0)
    tokens: int = Field(gt=0)
    registers: int = Field(ge=0)
    spill_bytes: int = Field(ge=0)
    shared_bytes: int = Field(ge=0)
    mma: int = Field(ge=0)
    wgmma: int = Field(ge=0)
    warps: int = Field(gt=0)
    stages: int = Field(gt=0)
    tile: dict[str, int]
    predicted_us: float = Field(ge=0)


class Manifest(BaseModel):
    """All kernels of a plan.

    Attributes:
        model: what the user called it.
        plan: digest of the plan that the sources hold.
        index_driven: whether survivors are data, so that the kernels serve any plan of the model.
        dtype: of activations and weights.
        versions: planner, triton and torch.
        kernels: in the order of targets, blocks and launches.
        left_out: one sentence per block of the model without kernels.
    """

    model_config = ConfigDict(extra="forbid")
    planner_kernels: int = FORMAT
    model: str
    plan: str
    index_driven: bool
    dtype: str
    versions: dict[str, str]
    kernels: list[CompiledKernel]
    left_out: list[str]

    def dump(self) -> str:
        """The file: equal manifests give equal text."""
        return json.dumps(self.model_dump(), indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the kernels of a folder that ``planner compile --target`` wrote.

    Raises:
        InputError: there are none, or they are broken, or of another plan than the one beside them.
    """
    home = folder / FOLDER
    path = home / NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"there are no kernels in '{folder}': planner compile --target makes them"
        ) from None
    except (OSError, UnicodeDecodeError):
        raise InputError(f"'{path}' cannot be read") from None
    except ValueError:
        raise InputError(f"'{path}' is truncated or not JSON") from None
    if not isinstance(document, dict) or "planner_kernels" not in document:
        raise InputError(f"'{path}' is not a manifest of planner")
    if document["planner_kernels"] != FORMAT:
        raise InputError(
            f"'{path}' has format {document['planner_kernels']}, this planner reads {FORMAT}"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"'{path}' is broken at {where}: {first['msg'].lower()}") from None
    _check_files(manifest, home)
    plan = folder / "plan.yaml"
    if plan.exists() and _digest_of(plan) != manifest.plan:
        raise InputError(f"'{home}' is of another plan than '{plan}': compile again with --target")
    return manifest


def _digest_of(plan: Path) -> str:
    """The digest that a plan's file carries."""
    load_plan(plan)  # says what is wrong with it
    return str(yaml.safe_load(plan.read_text(encoding="utf-8"))["digest"])


def _check_files(manifest: Manifest, home: Path) -> None:
    for kernel in manifest.kernels:
        try:
            (home / kernel.source).read_bytes()
            code = (home / kernel.cubin).read_bytes()
        except OSError as error:
            raise InputError(f"'{error.filename}' cannot be read: compile again") from None
        if sha256(code).hexdigest() != kernel.cubin_sha256:
            raise InputError(f"'{home / kernel.cubin}' was changed or cut off: compile again")
