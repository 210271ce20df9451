from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import medium_problem, problems

from planner.ir.errors import InputError
from planner.solver import Infeasible, take_while_fits
from planner.solver.problem import Choice


@st.composite
def scored(draw):
    """A problem with utilities of any kind: ties, negative ones, huge ones."""
    problem = draw(problems())
    score = st.sampled_from([0.0, 0.0, 1.0, -1.0, 1e30, -1e30, 0.5, 0.25])

    def scores(count):
        return np.array(draw(st.lists(score, min_size=count, max_size=count)), dtype=np.float64)

    tokens = tuple(replace(token, utility=float(scores(1)[0])) for token in problem.tokens)
    return replace(problem.with_utilities(scores(problem.switches)), tokens=tokens)


def grown(problem, choice):
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
def test_a_choice_is_always_feasible_and_leaves_nothing_that_fits(problem):
    fits = (problem.smallest_costs() <= problem.limits).all(axis=1)
    if not fits.any():
        with pytest.raises(Infeasible):
            take_while_fits(problem)
        return
    choice = take_while_fits(problem)
    assert problem.is_feasible(choice)
    assert not any(problem.is_feasible(more) for more in grown(problem, choice))
    utilities = np.array([token.utility for token in problem.tokens])
    assert utilities[choice.token_option] == utilities[fits].max()


@settings(max_examples=50, deadline=None)
@given(scored())
def test_kept_switches_have_the_best_utilities_of_their_site(problem):
    if not (problem.smallest_costs() <= problem.limits).all(axis=1).any():
        return
    choice = take_while_fits(problem)
    for site in problem.sites:
        kept = list(choice.kept[site.name])
        left = [switch for switch in range(site.switches) if switch not in kept]
        own = site.utilities
        assert all(own[a] >= own[b] for a in kept for b in left)


def test_order_of_utilities_decides():
    problem = medium_problem(0, "equal", "gamma", alike=True)
    choice = take_while_fits(problem)
    names, utilities = problem.switch_names, problem.flags_of(choice) * 0.0
    own = {f"{s.name}[{n}]": x for s in problem.sites for n, x in enumerate(s.utilities)}
    own |= {layer.name: layer.utility for layer in problem.layers}
    shifted = problem.with_utilities(np.array([own[name] * 3 - 1 for name in names]))
    assert take_while_fits(shifted) == choice
    # The best of the last layer, wanted most, is in; everything of the first, wanted least, is out.
    least, *_, most = (layer.name for layer in problem.layers)
    utilities[[name.startswith("mlp.5[") or name == most for name in names]] = 9.0
    utilities[names.index(least)] = -1.0
    first = take_while_fits(problem.with_utilities(utilities))
    assert first.kept["mlp.5"] == tuple(range(8))
    assert not first.layers_on[0]


def test_everything_fits_the_base_model():
    problem = medium_problem(0, "random", "gamma", alike=False)
    everything = Choice.everything(problem)
    free = replace(problem, limits=problem.cost(everything))
    assert take_while_fits(free) == everything


def test_utilities_that_do_not_fit_the_problem_are_refused():
    problem = medium_problem(0, "equal", "gamma", alike=True)
    with pytest.raises(InputError, match="not a finite number"):
        take_while_fits(problem.with_utilities(np.full(problem.switches, np.nan)))
    with pytest.raises(InputError, match="3 utilities"):
        problem.with_utilities(np.zeros(3))
