"""Answers are derived here a second time: from the question and the scene's record alone."""

import random
import re
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.errors import InputError
from planner.training.data import FAMILIES, SceneConversations, SceneQuestions
from planner.training.data.questions import ask
from planner.training.data.scenes import draw_scene
from planner.training.tiny_llava import build_processor

COLORS = {"red", "green", "blue", "yellow", "purple", "cyan"}
SHAPES = {"circle", "square", "triangle", "cross"}
ROW_NAMES, COLUMN_NAMES = ["top", "middle", "bottom"], ["left", "center", "right"]


def fits(thing: dict, words: str) -> bool:
    """Whether every attribute word of a phrase is true of an object's record."""
    for word in words.split():
        if word in COLORS and thing["color"] != word:
            return False
        if word in SHAPES and thing["shape"] != word:
            return False
        if word in ("small", "large") and thing["size"] != word:
            return False
    return True


def the_one(things: list[dict], words: str) -> dict:
    matches = [thing for thing in things if fits(thing, words)]
    assert len(matches) == 1, f"'{words}' fits {len(matches)} objects"
    return matches[0]


def place(thing: dict) -> str:
    return f"{ROW_NAMES[thing['row']]} {COLUMN_NAMES[thing['column']]}"


def solve(question: str, record: dict) -> str:
    things = list(record["objects"])
    if found := re.fullmatch(r"Is there a (.+)\?", question):
        return "yes" if any(fits(thing, found[1]) for thing in things) else "no"
    if found := re.fullmatch(r"What (color|shape|size) is the object in the (.+)\?", question):
        return next(thing for thing in things if place(thing) == found[2])[found[1]]
    if found := re.fullmatch(r"What (color|shape|size) is the (.+)\?", question):
        return the_one(things, found[2])[found[1]]
    if found := re.fullmatch(r"How many (.+) are there\?", question):
        words = {"crosses": "cross"}.get(found[1], found[1].removesuffix("s"))
        return str(sum(fits(thing, words) for thing in things))
    if found := re.fullmatch(r"Is the (.+) (above|below|left of|right of) the (.+)\?", question):
        a, relation, b = the_one(things, found[1]), found[2], the_one(things, found[3])
        axis = "row" if relation in ("above", "below") else "column"
        gap = b[axis] - a[axis]
        assert gap, "a relation along an axis on which both are equal"
        return "yes" if (gap > 0) == (relation in ("above", "left of")) else "no"
    if found := re.fullmatch(r"Where is the (.+)\?", question):
        return place(the_one(things, found[1]))
    if found := re.fullmatch(r"What (word|number) is written in the image\?", question):
        assert record["text"].isdigit() == (found[1] == "number")
        return record["text"]
    assert question == "Describe the image."
    lines = [f"the image shows {len(things)} objects."]
    lines += [
        f"there is a {t['size']} {t['color']} {t['shape']} in the {place(t)}." for t in things
    ]
    lines += [f"the text says {record['text']}."] if record["text"] else []
    return " ".join(lines)


@given(st.integers(0, 2**32), st.sampled_from(FAMILIES))
def test_answers_follow_from_the_scene(seed, family):
    rng = random.Random(seed)
    scene = draw_scene("test", rng)
    question = ask(scene, family, rng)
    if question is None:
        assert family in ("spatial", "text", "describe")
    else:
        assert question.family == family
        assert question.answer == solve(question.question, asdict(scene))


def test_negatives_are_what_they_are_called():
    kinds = Counter()
    for seed in range(400):
        rng = random.Random(seed)
        scene = draw_scene("train", rng)
        while len(scene.objects) < 3:
            scene = draw_scene("train", rng)
        question = ask(scene, "existence", rng)
        kinds[question.kind] += 1
        if question.kind == "adversarial":
            *_, color, shape = question.question.rstrip("?").split()
            things = asdict(scene)["objects"]
            shared = [fits(t, color) or fits(t, shape) for t in things]
            assert any(shared)
            assert question.answer == "no"
    assert kinds["positive"] == pytest.approx(200, abs=40)
    assert kinds["adversarial"] == pytest.approx(100, abs=35)


def test_evaluation_asks_every_family_equally_and_answers_are_spread():
    samples = [SceneQuestions("test", 600)[i] for i in range(600)]
    answers = {family: Counter() for family in FAMILIES}
    for sample in samples:
        (turn,) = sample.turns
        answers[turn.family][turn.answer] += 1
    assert {family: counts.total() for family, counts in answers.items()} == dict.fromkeys(
        FAMILIES, 100
    )
    for counts in answers.values():
        assert counts.most_common(1)[0][1] <= 65


def test_descriptions_are_long():
    tokenizer = build_processor().tokenizer
    dataset = SceneQuestions("test", 30, families=["describe"])
    lengths = [
        len(tokenizer(dataset[i].turns[0].answer, add_special_tokens=False)["input_ids"])
        for i in range(30)
    ]
    assert min(lengths) >= 50
    assert max(lengths) <= 96


def test_the_mixture_follows_its_weights():
    only = SceneConversations("train", 40, description_share=0, family_weights={"count": 1})
    families = Counter(turn.family for i in range(40) for turn in only[i].turns)
    assert set(families) <= {"count", "existence"}
    assert families["count"] > 3 * families["existence"]
    with pytest.raises(InputError, match='unknown family "smell"; known: existence'):
        SceneConversations("train", 1, family_weights={"smell": 1})


def test_training_conversations_hold_several_different_questions():
    dataset = SceneConversations("train", 60, questions=8, questions_beside_description=3)
    for i in range(60):
        conversation = dataset[i]
        questions = [turn.question for turn in conversation.turns]
        assert len(set(questions)) == len(questions)
        described = conversation.turns[0].family == "describe"
        assert len(questions) <= (4 if described else 8)
        for turn in conversation.turns:
            assert turn.answer == solve(turn.question, asdict(conversation.scene))
