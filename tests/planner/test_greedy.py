from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import medium_problem, problems

from planner.ir.errors import InputError
from planner.solver import Infeasible, Scores, take_while_fits
from planner.solver.problem import Choice


@st.composite
def scored(draw):
    """A problem with scores of any kind: ties, negative ones, huge ones."""
    problem = draw(problems())
    score = st.sampled_from([0.0, 0.0, 1.0, -1.0, 1e30, -1e30, 0.5, 0.25])

    def scores(count):
        return np.array(draw(st.lists(score, min_size=count, max_size=count)), dtype=np.float64)

    sites = {site.name: scores(site.switches) for site in problem.sites}
    return problem, Scores(scores(len(problem.tokens)), scores(len(problem.layers)), sites)


def grown(problem, choice, scores):
    """Every choice with one more switch, or one more layer at its minima, than this one."""
    for index, layer in enumerate(problem.layers):
        if not choice.layers_on[index]:
            on = (*choice.layers_on[:index], True, *choice.layers_on[index + 1 :])
            entered = {site.name: tuple(range(site.minimum)) for site in layer.sites}
            yield replace(choice, layers_on=on, kept=choice.kept | entered)
            continue
        for site in layer.sites:
            kept = choice.kept[site.name]
            for switch in set(range(site.switches)) - set(kept):
                yield replace(
                    choice, kept=choice.kept | {site.name: tuple(sorted((*kept, switch)))}
                )


@settings(max_examples=150, deadline=None)
@given(scored())
def test_a_choice_is_always_feasible_and_leaves_nothing_that_fits(case):
    problem, scores = case
    fits = (problem.smallest_costs() <= problem.limits).all(axis=1)
    if not fits.any():
        with pytest.raises(Infeasible):
            take_while_fits(problem, scores)
        return
    choice = take_while_fits(problem, scores)
    assert problem.is_feasible(choice)
    assert not any(problem.is_feasible(more) for more in grown(problem, choice, scores))
    assert scores.tokens[choice.token_option] == scores.tokens[fits].max()


@settings(max_examples=50, deadline=None)
@given(scored())
def test_kept_switches_have_the_best_scores_of_their_site(case):
    problem, scores = case
    if not (problem.smallest_costs() <= problem.limits).all(axis=1).any():
        return
    choice = take_while_fits(problem, scores)
    for site in problem.sites:
        kept = list(choice.kept[site.name])
        left = [switch for switch in range(site.switches) if switch not in kept]
        own = scores.sites[site.name]
        assert all(own[a] >= own[b] for a in kept for b in left)


def test_order_of_scores_decides():
    problem = medium_problem(0, "equal", "gamma", alike=True)
    scores = Scores.of_utilities(problem)
    choice = take_while_fits(problem, scores)
    shifted = Scores(
        scores.tokens * 2, scores.layers * 3 - 1, {k: v * 3 - 1 for k, v in scores.sites.items()}
    )
    assert take_while_fits(problem, shifted) == choice
    # The best of the last layer, wanted most, is in; everything of the first, wanted least, is out.
    wanted = {name: np.zeros_like(own) for name, own in scores.sites.items()}
    wanted["mlp.5"] = np.full(8, 9.0)
    layers = np.array([-1.0, 0.0, 0.0, 0.0, 0.0, 9.0])
    first = take_while_fits(problem, Scores(scores.tokens, layers, wanted))
    assert first.kept["mlp.5"] == tuple(range(8))
    assert not first.layers_on[0]


def test_everything_fits_the_base_model():
    problem = medium_problem(0, "random", "gamma", alike=False)
    everything = Choice.everything(problem)
    free = replace(problem, limits=problem.cost(everything))
    assert take_while_fits(free, Scores.of_utilities(free)) == everything


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.zeros(2)}, "token options have shape"),
        ({"layers": np.full(6, np.nan)}, "layers is not a finite"),
        ({"sites": {}}, "no scores for site heads.0"),
    ],
)
def test_scores_that_do_not_fit_the_problem_are_refused(change, words):
    problem = medium_problem(0, "equal", "gamma", alike=True)
    with pytest.raises(InputError, match=words):
        take_while_fits(problem, replace(Scores.of_utilities(problem), **change))
