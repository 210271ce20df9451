"""Tiles by measurement, with a clock that is made up."""

import pytest
import torch

from planner.ir.errors import InputError
from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.ops.project_rows import ProjectRows
from planner.kernels.survivors import Survivors
from planner.kernels.targets.autotune import autotuned, local_target
from planner.kernels.targets.plan_launches import Call, launches_of
from planner.kernels.triton.tiles import TARGETS, ranked_tiles, tiles_chosen_by

TARGET = TARGETS["sm_90"]


def run_mlp():
    def meta(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    up, gate, down = meta(11008, 4096), meta(11008, 4096), meta(4096, 11008)
    survivors = Survivors.of([range(8256)], 11008, 8, device="meta")
    x = meta(1, 640, 4096)
    inner = ProjectRows(x, up, None, survivors, gate=gate, activation="silu").run(triton=True)
    ProjectColumns(inner, down, None, survivors).run(triton=True)


CALL = Call("mlp.down_proj", 0, "prefill", 1, 640, run_mlp)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path))


def blocks(launch):
    return tuple(launch.arguments[f"BLOCK_{axis}"] for axis in "MNK")


def clock(timed):
    """A clock by which the third candidate of every product is the fastest."""
    asked = []
    with tiles_chosen_by(asked.append):
        launches_of([CALL], TARGET)
    chosen = {wanted: ranked_tiles(wanted)[2] for wanted in asked}
    favourites = {(tile.block_m, tile.block_n, tile.block_k) for tile in chosen.values()}

    def seconds(launches):
        timed.append(launches)
        return sum(0.1 if blocks(launch) in favourites else 1.0 for launch in launches)

    return seconds, chosen


def tuned(seconds, device="some GPU"):
    return autotuned([CALL], TARGET, device_name=device, timer=seconds)


def test_the_fastest_tile_is_taken_and_remembered():
    timed = []
    seconds, chosen = clock(timed)
    tiles = tuned(seconds)
    sizes = {w: (t.block_m, t.block_n, t.block_k) for w, t in chosen.items()}
    assert {w: (t.block_m, t.block_n, t.block_k) for w, t in tiles.items()} == sizes
    assert len(timed) == 6 * len(chosen)
    with tiles_chosen_by(tiles.get):
        launches = launches_of([CALL], TARGET)
    assert {blocks(launch) for _, launch in launches} == set(sizes.values())
    timed.clear()
    assert tuned(seconds) == tiles
    assert timed == []
    tuned(seconds, "another GPU")
    assert timed


def test_a_broken_memory_is_measured_again(tmp_path):
    timed = []
    seconds, _ = clock(timed)
    tiles = tuned(seconds)
    (file,) = (tmp_path / "tiles").iterdir()
    file.write_text(file.read_text()[:50])
    timed.clear()
    assert tuned(seconds) == tiles
    assert timed


def test_without_a_gpu_or_for_another_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is none here"):
        local_target(TARGETS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert local_target(TARGETS) == "sm_90"
    with pytest.raises(InputError, match="needs --target sm_90"):
        local_target({"sm_80": TARGETS["sm_80"]})
