from collections import Counter

import pytest

from planner.training.data import FAMILIES, Conversation, SceneQuestions, Turn
from planner.training.data.__main__ import main as write_scenes
from planner.training.evaluate import facts, language_prior, score, summarise

TRUTH = (
    "the image shows 2 objects. there is a small red circle in the top left. "
    "there is a large blue cross in the bottom right. the text says cat."
)


def describe(answer):
    return score(Turn("Describe the image.", TRUTH, "describe"), answer)


def test_a_description_scores_the_share_of_right_facts():
    assert facts(TRUTH).total() == 8
    assert describe(TRUTH) == 1
    assert describe("") == 0
    assert describe("nothing that parses") == 0
    assert describe(TRUTH.replace("small red", "large red")) == pytest.approx(7 / 8)
    assert describe(TRUTH.replace(" the text says cat.", "")) == pytest.approx(7 / 8)
    # An object in the wrong place is three facts missed and three stated wrongly.
    assert describe(TRUTH.replace("top left", "top right")) == pytest.approx(5 / 8)
    # Saying more than is true costs, and so does saying it twice.
    invented = TRUTH + " there is a small cyan cross in the middle left."
    assert describe(invented) == pytest.approx(8 / 11)
    assert describe(TRUTH + " " + TRUTH) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("answer", "value"),
    [("top left", 1), (" Top  left. ", 1), ("top", 0), ("left top", 0), ("", 0)],
)
def test_short_answers_must_be_equal(answer, value):
    assert score(Turn("Where is the red circle?", "top left", "spatial"), answer) == value


def test_reference_answers_score_one_and_the_prior_far_less():
    samples = [SceneQuestions("test", 240)[i] for i in range(240)]
    right = summarise(samples, [sample.turns[0].answer for sample in samples])
    assert right["accuracy"] == 1
    assert right["families"] == dict.fromkeys(FAMILIES, 1.0)
    prior = language_prior(SceneQuestions("train", 1200), samples)
    assert set(prior["families"]) == set(FAMILIES)
    assert 0.1 < prior["accuracy"] < 0.45


def test_the_prior_is_the_most_common_answer_to_the_same_question():
    def asked(question, answer):
        return Conversation("x", None, (Turn(question, answer, "count"),))

    training = [
        asked("a?", "1"),
        asked("a?", "1"),
        asked("a?", "2"),
        asked("b?", "2"),
        asked("c?", "2"),
    ]
    measured = language_prior(training, [asked("a?", "1"), asked("b?", "2"), asked("new?", "2")])
    assert measured["accuracy"] == 1
    assert Counter(measured["families"]) == {"count": 1.0}


def test_writing_no_scenes_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        write_scenes(["--output", "unused", "--scenes", "0"])
    assert stopped.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err.splitlines()[-1]
