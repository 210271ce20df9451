"""The audit: made-up labels with known faults, brute force, broken files, and the page."""

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.audit import Labels, Terms, audit, decide, judge, read_labels, worth, write_labels
from planner.audit.audit_page import page
from planner.audit.crosscheck import best_utility
from planner.audit.surrogate import all_plans, predictions
from planner.ir.errors import InputError
from planner.planning.catalog import find_model
from planner.planning.graph_cache import lowered_graph
from planner.solver import solve
from tests.problems import best_by_enumeration, problems

BUDGETS = (0.6, 0.75, 0.9)


@pytest.fixture(scope="module")
def graph():
    return lowered_graph(find_model("tiny-llava"))[0]


def labels_of(graph, switches="layers", samples=4, seed=0, losses=True):
    """Labels by the heuristic, of made-up utilities; losses that are additive but for a little."""
    terms = Terms("tiny-llava", graph.properties["fingerprint"], switches, "heuristic", 36, 16)
    made = {budget: terms.problem(graph, budget) for budget in BUDGETS}
    names = made[0.6].switch_names
    rng = np.random.default_rng(seed)
    utilities, plans, costs, limits, tried = [], [], [], [], {}
    for _ in range(samples):
        gained = rng.gamma(0.5, size=len(names)) - 0.05
        for problem in made.values():
            if losses:
                everything = all_plans(len(names))
                tried[len(plans)] = ~everything @ gained + 0.02 * rng.random(len(everything))
                tried[len(plans)][-1] = 0
            problem = problem.with_utilities(worth(gained))
            flags = decide(problem)
            utilities.append(gained)
            plans.append(flags)
            costs.append(problem.cost(problem.choice_of(flags))[0])
            limits.append(problem.limits[0])
    return Labels(
        terms,
        names,
        tuple(f"sample {n}" for n in range(samples) for _ in BUDGETS),
        np.array(BUDGETS * samples),
        np.array(utilities),
        np.array(plans),
        np.array(costs),
        np.array(limits),
        tried,
    )


def with_one_option(problem):
    """The problem with its first token option alone."""

    def cut(part):
        return replace(part, costs=part.costs[:1])

    layers = [replace(cut(layer), sites=tuple(map(cut, layer.sites))) for layer in problem.layers]
    return replace(problem, tokens=problem.tokens[:1], layers=tuple(layers))


@given(problem=problems(metrics=1), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_flags_and_choices_say_the_same(problem, seed):
    rng = np.random.default_rng(seed)
    flags = rng.random(problem.switches) < 0.6
    choice = problem.choice_of(flags)
    again = problem.flags_of(choice)
    assert problem.choice_of(again) == choice
    assert not (again & ~flags).any()
    assert len(problem.switch_names) == len(flags)
    values = rng.normal(size=problem.switches)
    valued = problem.with_utilities(values)
    always = problem.tokens[0].utility
    assert valued.utility(choice) == pytest.approx(always + float(values @ again))


@given(problem=problems(metrics=1))
@settings(deadline=None, max_examples=60)
def test_the_second_solver_finds_the_optimum_too(problem):
    problem = with_one_option(problem)
    problem = replace(problem, limits=np.maximum(problem.limits, problem.smallest_costs()[0]))
    best = best_by_enumeration(problem)
    largest = max([1e-9, *(abs(layer.utility) for layer in problem.layers)])
    largest = max([largest, *(float(np.abs(s.utilities).max(initial=0)) for s in problem.sites)])
    assert best_utility(problem) == pytest.approx(best, abs=1e-9 * largest)
    used = problem.choice_of(decide(problem))
    assert problem.is_feasible(used)


@given(values=st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_worth_is_positive_keeps_the_order_and_is_nearly_the_positive_part(values):
    utilities = np.array(values)
    found = worth(utilities)
    assert (found >= 0).all()
    assert (np.diff(found[np.argsort(utilities)]) >= 0).all()
    size = np.abs(utilities).mean()
    softness = 0.05 * size if size > 1e-300 else 1.0
    np.testing.assert_allclose(found, np.maximum(utilities, 0), atol=softness * np.log(2) * 1.001)


@pytest.mark.parametrize("switches", ["adallava-l", "layers", "layers,heads,mlp"])
def test_honest_labels_pass(graph, switches):
    labels = labels_of(graph, switches, losses=switches == "layers")
    found = audit(labels, graph, exact=True)
    summary = found.summary
    assert summary["infeasible"] == summary["priced_wrong"] == summary["exact"]["different"] == 0
    assert summary["proven"] == 1
    assert summary["labels"] == 12
    assert [row["labels"] for row in summary["budgets"]] == [4, 4, 4]
    if "heads" not in switches:
        # With equal costs the best-scored switches are the best plan.
        assert summary["optimal"] == 1
        assert summary["gap"]["max"] == 0
        assert summary["dominated"]["count"] == 0
    json.dumps(summary)


def test_faulty_labels_are_found(graph):
    labels = labels_of(graph, losses=False)
    plans, costs = labels.plans.copy(), labels.costs.copy()
    plans[0] = True
    best, worst = labels.utilities[1].argmax(), labels.utilities[1].argmin()
    plans[1, best], plans[1, worst] = plans[1, worst], plans[1, best]
    costs[2] += 1
    verdicts = judge(replace(labels, plans=plans, costs=costs), graph)
    assert [v.feasible for v in verdicts[:3]] == [False, True, True]
    assert verdicts[0].utilisation > 1
    assert [v.priced_right for v in verdicts[:4]] == [False, True, False, True]
    taken_for = worth(labels.utilities[1])
    swapped = taken_for[best] - taken_for[worst]
    assert verdicts[1].lost == pytest.approx(swapped)
    assert verdicts[1].gap == pytest.approx(swapped / verdicts[1].optimum)
    dominating = verdicts[1].dominating
    assert dominating is not None
    assert dominating.tolist() == labels.plans[1].tolist()
    summary = audit(replace(labels, plans=plans, costs=costs), graph).summary
    assert (summary["infeasible"], summary["priced_wrong"]) == (1, 2)
    assert summary["dominated"]["count"] == 1
    (example,) = summary["dominated"]["examples"]
    assert (example["without"], example["with"]) == ([f"layer.{worst}"], [f"layer.{best}"])


def test_gaps_are_those_of_the_solver(graph):
    labels = labels_of(graph, "layers,heads,mlp", losses=False, samples=2)
    made = labels.problems(graph)
    for index, verdict in enumerate(judge(labels, graph)):
        problem = made[labels.budgets[index]].with_utilities(worth(labels.utilities[index]))
        best = solve(problem)
        utility = problem.utility(problem.choice_of(labels.plans[index]))
        assert verdict.gap == pytest.approx((best.utility - utility) / best.utility, abs=1e-12)
        assert verdict.utilisation == labels.costs[index] / labels.limits[index]


def test_surrogates_and_regret_by_hand(graph):
    labels = labels_of(graph, samples=2, seed=5)
    found = audit(labels, graph)
    made = labels.problems(graph)
    for surrogate in found.surrogates:
        losses = labels.losses[surrogate.label]
        problem = made[labels.budgets[surrogate.label]]
        fits = [problem.is_feasible(problem.choice_of(plan)) for plan in all_plans(8)]
        best = losses[fits].min()
        label = int((labels.plans[surrogate.label] * 2 ** np.arange(8)).sum())
        assert surrogate.regret["label"] == pytest.approx(losses[label] - best)
        assert min(surrogate.regret.values()) >= 0
        assert surrogate.rank_additive > 0.9
    by_budget = found.summary["surrogate"]["budgets"]
    on = [round((sum(plan)) if fit else 0) for plan, fit in zip(all_plans(8), fits)]
    assert by_budget[-1]["plans"] == sum(count == max(on) for count in on)


def test_the_pairwise_surrogate_is_exact_for_pairs():
    rng = np.random.default_rng(0)
    plans = all_plans(5)
    off = (~plans).astype(float)
    single, both = rng.normal(size=5), np.triu(rng.normal(size=(5, 5)), 1)
    losses = off @ single + ((off @ both) * off).sum(-1)
    additive, pairwise = predictions(losses, plans)
    np.testing.assert_allclose(pairwise, losses, atol=1e-12)
    np.testing.assert_allclose(additive, off @ single, atol=1e-12)


def test_files_read_back_and_broken_ones_are_refused(graph, tmp_path):
    labels, path = labels_of(graph, samples=1), tmp_path / "labels.parquet"
    write_labels(path, labels)
    read = read_labels(path)
    assert (read.terms, read.switches, read.samples) == (
        labels.terms,
        labels.switches,
        labels.samples,
    )
    for name in ("budgets", "utilities", "plans", "costs", "limits"):
        np.testing.assert_array_equal(getattr(read, name), getattr(labels, name))
    assert all((read.losses[index] == losses).all() for index, losses in labels.losses.items())

    whole, table = path.read_bytes(), pyarrow.parquet.read_table(path)
    utilities = table.column("utilities").to_pylist()
    utilities[0][0] = float("nan")

    def with_column(name, values):
        kept = table.drop_columns([name]).append_column(name, values)
        return kept.replace_schema_metadata(table.schema.metadata)

    header = json.loads(table.schema.metadata[b"planner_labels"])
    newer = json.dumps({**header, "format": 99}).encode()
    cases = [
        (whole[: len(whole) // 2], "truncated or not a Parquet file"),
        (b"", "truncated or not a Parquet file"),
        (table.drop_columns(["utilities"]), "no column 'utilities'"),
        (table.replace_schema_metadata(None), "not one of labels"),
        (table.replace_schema_metadata({b"planner_labels": newer}), "format 99"),
        (table.replace_schema_metadata({b"planner_labels": b"{"}), "not one of labels"),
        (table.slice(0, 0), "are empty"),
        (with_column("utilities", pyarrow.array(utilities)), "not a finite number"),
        (with_column("plan", pyarrow.array([[True]] * 3)), "are broken"),
        (with_column("budget", pyarrow.array([0.5, 0.0, 0.5])), "at most 1"),
        (with_column("cost", pyarrow.array(["a", "b", "c"])), "are broken"),
    ]
    for broken, words in cases:
        if isinstance(broken, bytes):
            path.write_bytes(broken)
        else:
            pyarrow.parquet.write_table(broken, path)
        with pytest.raises(InputError, match=words):
            read_labels(path)
    with pytest.raises(InputError, match="there is no file"):
        read_labels(tmp_path / "none.parquet")


def test_labels_of_another_model_are_refused(graph):
    labels = labels_of(graph, samples=1)
    other = replace(labels.terms, fingerprint="another")
    with pytest.raises(InputError, match="are for 'tiny-llava'"):
        audit(replace(labels, terms=other), graph)
    with pytest.raises(InputError, match="which are not those"):
        audit(replace(labels, switches=("layer.0",) * 8), graph)


def test_the_page_holds_tables_and_plots(graph):
    labels = labels_of(graph)
    text = page(audit(labels, graph))
    assert text.count("<svg") == 2
    assert "The surrogate against the true loss" in text
    assert "<script" not in text
    assert not [part for part in ('src="http', "url(http") if part in text]
    hostile = replace(labels, samples=("<b>",) * len(labels), plans=~labels.plans)
    assert "<b>" not in page(audit(hostile, graph))


def test_the_command(graph, cli, cli_json, tmp_path):
    write_labels(tmp_path / "labels.parquet", labels_of(graph))
    found = cli_json("audit", "labels.parquet", "--exact", "-o", "audit.html")
    assert (found["infeasible"], found["exact"]["different"]) == (0, 0)
    assert (tmp_path / "audit.html").read_text().startswith("<!doctype html>")
    code, out, _ = cli("audit", "labels.parquet", "-v")
    assert code == 0
    assert "every plan tried on 4 samples" in out
    labels = labels_of(graph, samples=1)
    other = replace(labels, terms=replace(labels.terms, fingerprint="another"))
    write_labels(tmp_path / "others.parquet", other)
    for arguments, words in [
        (["none.parquet"], "there is no file of labels"),
        (["labels.parquet", "-o", "audit.txt"], "must be a file with the suffix .html"),
        (["others.parquet"], "are for 'tiny-llava' (another)"),
        (["audit.html"], "truncated or not a Parquet file"),
    ]:
        code, _, err = cli("audit", *arguments)
        assert code == 2
        assert words in err
        assert "Traceback" not in err
