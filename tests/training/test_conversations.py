import json

import pytest
from PIL import Image

from planner.ir.errors import InputError
from planner.training.data import LlavaConversations, SceneConversations, write_llava


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "images" / "good.png")
    return tmp_path


def record(**changes):
    human = {"from": "human", "value": "<image>\nWhat is it?"}
    good = {
        "id": "a",
        "image": "good.png",
        "conversations": [human, {"from": "gpt", "value": "A dot."}],
    }
    return {**good, **changes}


def load(folder, records, **options):
    path = folder / "data.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return LlavaConversations(path, folder / "images", **options)


def test_written_scenes_read_back_the_same(tmp_path):
    made = [SceneConversations("val", 5)[i] for i in range(5)]
    path = write_llava(made, tmp_path)
    read = LlavaConversations(path, tmp_path / "images")
    assert len(read) == 5
    for ours, theirs in zip(made, read):
        assert (theirs.id, theirs.turns, theirs.scene) == (ours.id, ours.turns, ours.scene)
        assert theirs.image.tobytes() == ours.image.tobytes()
    messages = json.loads(path.read_text())[0]["conversations"]
    assert messages[0]["value"].startswith("<image>\n")
    assert [m["from"] for m in messages[:2]] == ["human", "gpt"]


def test_reads_the_forms_of_the_public_mixture(folder):
    many_turns = [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A dot."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    text_only = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    data = load(
        folder,
        [
            record(conversations=many_turns, model="extra keys are allowed"),
            {"id": 7, "conversations": text_only},
            {"id": 8, "conversations": [{"from": "gpt", "value": "Welcome"}, *text_only]},
        ],
    )
    first, second, third = data
    assert third.turns == second.turns
    assert [(t.question, t.answer) for t in first.turns] == [
        ("What is it?", "A dot."),
        ("Sure?", "Yes."),
    ]
    assert first.image.size == (4, 4)
    assert second.image is None
    assert second.id == "7"


BAD = {
    "no answer": (
        record(conversations=record()["conversations"][:1]),
        "last question has no answer",
    ),
    "empty answer": (
        record(conversations=[record()["conversations"][0], {"from": "gpt", "value": "  "}]),
        "message 1 has no text",
    ),
    "missing image": (record(image="lost.png"), "lost.png.* does not exist"),
    "no conversation": (record(conversations=[]), '"conversations" is missing or empty'),
    "wrong speaker": (record(conversations=record()["conversations"][:1] * 2), 'from "gpt"'),
    "only an answer": (record(conversations=record()["conversations"][1:]), "has no answer"),
    "no file name": (record(image=None), '"image" is not the name of a file'),
    "not a record": ("text", "expected an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_one_error_or_skipped_and_counted(folder, case):
    bad, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        load(folder, [record(), bad])
    assert "data.json, record 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    data = load(folder, [record(), bad], on_error="skip")
    assert (len(data), data.skipped) == (1, 1)


@pytest.mark.parametrize("cut", [0, 100, 500])
def test_a_corrupt_jpeg_is_named_or_replaced(folder, cut):
    whole = folder / "images" / "whole.jpg"
    Image.effect_noise((32, 32), 80).convert("RGB").save(whole)
    (folder / "images" / "cut.jpg").write_bytes(whole.read_bytes()[:cut])
    records = [record(id="b", image="cut.jpg"), record(id="c")]
    with pytest.raises(InputError, match=r'data\.json, id "b": image .*cut\.jpg'):
        load(folder, records)[0]
    data = load(folder, records, on_error="skip")
    assert data[0].id == "c"
    assert data[0].id == "c"
    assert data.skipped == 1
    with pytest.raises(InputError, match="no record has a readable image"):
        load(folder, records[:1], on_error="skip")[0]


def test_a_picture_of_too_many_pixels_is_named_or_replaced(folder, monkeypatch):
    Image.new("RGB", (64, 64)).save(folder / "images" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    records = [record(id="b", image="large.png"), record(id="c")]
    with pytest.raises(InputError, match=r"large\.png\" cannot be read"):
        load(folder, records)[0]
    assert load(folder, records, on_error="skip")[0].id == "c"


def test_bad_files_and_options(folder):
    with pytest.raises(InputError, match=r"data\.json is not valid JSON"):
        load(folder, "[{]")
    with pytest.raises(InputError, match="expected a list"):
        load(folder, {"id": 1})
    with pytest.raises(InputError, match=r"lost\.json does not exist"):
        LlavaConversations(folder / "lost.json", folder)
    with pytest.raises(InputError, match="on_error"):
        load(folder, [record()], on_error="ignore")
