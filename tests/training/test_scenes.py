import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.training.data import SPLITS, Scene, SceneConversations, SceneQuestions
from planner.training.data.render import IMAGE_SIZE, render
from planner.training.data.scenes import draw_scene, split_of

seeds = st.integers(0, 2**32)


@given(seeds, st.sampled_from(sorted(SPLITS)))
def test_a_scene_is_its_seed(seed, split):
    scene = draw_scene(split, random.Random(seed))
    assert scene == draw_scene(split, random.Random(seed))
    assert split_of(scene) == split
    assert Scene.from_record(asdict(scene)) == scene


@given(seeds)
def test_objects_and_text_never_share_a_cell(seed):
    scene = draw_scene("train", random.Random(seed))
    cells = [(o.row, o.column) for o in scene.objects]
    assert len(set(cells)) == len(cells)
    assert all(row != scene.text_row for row, _ in cells)
    assert (scene.text is None) == (scene.text_row is None)
    assert (len(scene.objects) >= 4) == scene.hard


def test_splits_share_no_content_whatever_the_seed():
    shown = {
        split: {
            dataset[i].scene.identity()
            for seed in (0, 1)
            for dataset in (
                SceneConversations(split, 150, seed),
                SceneQuestions(split, 60, seed),
            )
            for i in range(len(dataset))
        }
        for split in SPLITS
    }
    assert not shown["train"] & shown["test"]
    assert not shown["train"] & shown["val"]
    assert not shown["val"] & shown["test"]


def test_appearance_changes_pixels_but_not_the_split():
    scene = next(s for s in (draw_scene("train", random.Random(i)) for i in range(100)) if s.hard)
    other = replace(scene, appearance=scene.appearance + 1)
    assert split_of(other) == split_of(scene)
    assert np.any(np.asarray(render(other)) != np.asarray(render(scene)))


@given(seeds)
def test_rendering_shows_each_object_in_its_cell(seed):
    scene = draw_scene("test", random.Random(seed))
    image = render(scene)
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.mode == "RGB"
    pixels = np.asarray(image, dtype=int)
    assert np.array_equal(pixels, np.asarray(render(scene)))
    # Every cell with an object is more colourful than the cells with none.
    colourfulness = {}
    for row in range(3):
        for column in range(3):
            cell = pixels[1 + 18 * row : 19 + 18 * row, 1 + 18 * column : 19 + 18 * column]
            colourfulness[row, column] = np.percentile(np.ptp(cell, axis=-1), 90)
    filled = {(o.row, o.column) for o in scene.objects}
    empty = [
        v for cell, v in colourfulness.items() if cell not in filled and cell[0] != scene.text_row
    ]
    assert min(colourfulness[cell] for cell in filled) > max(empty, default=0)


def test_conversations_are_deterministic_and_seeds_differ():
    first, again, other = (SceneConversations("train", 50, seed) for seed in (7, 7, 8))
    for i in range(50):
        assert first[i].turns == again[i].turns
        assert first[i].image.tobytes() == again[i].image.tobytes()
    assert any(first[i].scene != other[i].scene for i in range(50))
    with pytest.raises(IndexError):
        first[50]
