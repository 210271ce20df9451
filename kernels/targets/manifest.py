"""The record of a plan's generated kernels: ``kernels/manifest.json`` beside the plan.

Reading needs neither torch nor Triton.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from planner.documents import of_format, read_json, validated
from planner.ir.errors import InputError
from planner.kernels.triton.tiles import Product, Tile
from planner.plan import load_plan, plan_digest

FORMAT = 2
FOLDER, NAME = "kernels", "manifest.json"


class Resources(BaseModel):
    """What a launch of a compiled kernel takes."""

    registers: int = Field(ge=0)  # per thread
    # Stack frame per thread; the kernels keep nothing there but spilled registers.
    spill_bytes: int = Field(ge=0)
    shared_bytes: int = Field(ge=0)  # shared memory per program
    # Tensor-core instructions in the code (not executed: loops count once).
    mma: int = Field(ge=0)
    wgmma: int = Field(ge=0)


class CompiledKernel(Resources):
    """One kernel for one target."""

    model_config = ConfigDict(extra="forbid")
    kernel: str  # name of planner's kernel that it was made from
    function: str  # in the source
    target: str
    # By parameter: what of a launch is compiled in (see `planner.kernels.targets.keys`).
    facts: dict[str, bool | int | str | None]
    # Paths inside the folder; metadata is Triton's.
    source: str
    cubin: str
    metadata: str
    modules: str  # of a layer, that run it
    phase: str
    layers: str  # that run it, as ranges
    # Of the first op that runs it; it is predicted for these.
    batch: int = Field(gt=0)
    tokens: int = Field(gt=0)
    warps: int = Field(gt=0)
    stages: int = Field(gt=0)
    tile: dict[str, int]
    predicted_us: float = Field(ge=0)  # microseconds by the cost model; nothing was timed


class Manifest(BaseModel):
    """All kernels of a plan."""

    model_config = ConfigDict(extra="forbid")
    planner_kernels: int = FORMAT
    model: str
    graph: str  # fingerprint of the model's Graph
    plan: str  # digest of the plan that the sources hold
    # Whether survivors are data, so that the kernels serve any plan of the model.
    index_driven: bool
    dtype: str
    versions: dict[str, str]
    files: dict[str, str]  # path inside the folder -> SHA-256
    # Of the matrix products, which launches must be given to find their kernels.
    tiles: list[tuple[Product, Tile]]
    kernels: list[CompiledKernel]
    left_out: list[str]  # one sentence per block of the model without kernels

    def dump(self) -> str:
        """The file: equal manifests give equal text."""
        return self.model_dump_json(indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the kernels of a folder that ``planner compile --target`` wrote; InputError
    where there are none, or they are broken, or of another plan than the one beside them."""
    home = folder / FOLDER
    path = home / NAME
    if not path.is_file():
        raise InputError(f"there are no kernels in '{folder}': planner compile --target makes them")
    document = read_json(path, "manifest")
    of_format(document, "planner_kernels", FORMAT, path, "manifest")
    manifest = validated(Manifest, document, f"'{path}'")
    _check_files(manifest, home)
    plan = folder / "plan.yaml"
    if plan.exists() and plan_digest(load_plan(plan)) != manifest.plan:
        raise InputError(f"'{home}' is of another plan than '{plan}': compile again with --target")
    return manifest


def _check_files(manifest: Manifest, home: Path) -> None:
    named = {path for row in manifest.kernels for path in (row.source, row.cubin, row.metadata)}
    if named - set(manifest.files):
        raise InputError(f"'{home / NAME}' is broken: it has no digest of {min(named)}")
    for name, digest in manifest.files.items():
        try:
            contents = (home / name).read_bytes()
        except OSError as error:
            raise InputError(f"'{error.filename}' cannot be read: compile again") from None
        if sha256(contents).hexdigest() != digest:
            raise InputError(f"'{home / name}' was changed or cut off: compile again")
