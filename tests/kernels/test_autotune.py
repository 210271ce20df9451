"""Tiles by measurement, with a clock that is made up."""

from functools import partial

import pytest
import torch

from planner.ir.errors import InputError
from planner.kernels.autotune import autotuned, local_target
from planner.kernels.codegen import Origin, generate
from planner.kernels.interpreter import interpreting
from planner.kernels.shapes import AttentionShape, Block, MLPShape, NormShape
from planner.kernels.tiles import TARGETS, ranked_tiles, tiles_chosen_by
from planner.kernels.trial import load_source, trial

SHAPE = MLPShape(4096, 11008, ((0, 8256),), "silu", norm=NormShape("rms"))
BLOCK = Block(SHAPE, "prefill", 640, 640, 1, (0,))
write = partial(generate, target=TARGETS["sm_90"], origin=Origin("", "", ""))


def source_of(block):
    return write([block])[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANNER_CACHE", str(tmp_path))


def clock(timed):
    """A clock by which the third candidate of every product is the fastest."""

    def seconds(source):
        timed.append(source)
        return sum(favourites.get(tuple(kernel.tile.values()), 1.0) for kernel in source.kernels)

    asked = []
    with tiles_chosen_by(asked.append):
        source_of(BLOCK)
    chosen = {wanted: ranked_tiles(wanted)[2] for wanted in asked}
    favourites = {(t.block_m, t.block_n, t.block_k): 0.1 for t in chosen.values()}
    return seconds, chosen


def test_the_fastest_tile_is_taken_and_remembered():
    timed = []
    seconds, chosen = clock(timed)
    tiles = autotuned([BLOCK], source_of, "some GPU", timer=seconds)
    sizes = {w: (t.block_m, t.block_n, t.block_k) for w, t in chosen.items()}
    assert {w: (t.block_m, t.block_n, t.block_k) for w, t in tiles.items()} == sizes
    assert len(timed) == 6 * len(chosen)
    with tiles_chosen_by(tiles.get):
        tuned = source_of(BLOCK)
    assert {tuple(k.tile.values()) for k in tuned.kernels} >= set(sizes.values())
    timed.clear()
    assert autotuned([BLOCK], source_of, "some GPU", timer=seconds) == tiles
    assert timed == []
    autotuned([BLOCK], source_of, "another GPU", timer=seconds)
    assert timed


def test_a_broken_memory_is_measured_again(tmp_path):
    timed = []
    seconds, _ = clock(timed)
    tiles = autotuned([BLOCK], source_of, "some GPU", timer=seconds)
    (file,) = (tmp_path / "tiles").iterdir()
    file.write_text(file.read_text()[:50])
    timed.clear()
    assert autotuned([BLOCK], source_of, "some GPU", timer=seconds) == tiles
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


@pytest.mark.parametrize("index_driven", [False, True])
def test_trials_launch_every_kernel_on_valid_arguments(index_driven, tmp_path):
    """Interpreted: an index beyond its tensor would be an error."""
    shapes = [
        AttentionShape(32, 16, 2, 4, (0, 3), 16, norm=NormShape("rms")),
        MLPShape(32, 64, ((0, 16), (32, 48)), "silu", norm=NormShape("rms")),
    ]
    for shape in shapes:
        for phase, tokens in (("prefill", 20), ("decode", 1)):
            block = Block(shape, phase, tokens, 20, 2, (0,))
            (source,) = write([block], dtype=torch.float32, index_driven=index_driven)
            module = load_source(source, tmp_path)
            with interpreting():
                for kernel in source.kernels:
                    trial(module, kernel, torch.device("cpu"))()
