"""Plans whose file is whole and whose contents are not: none is taken for another model's plan."""

from contextlib import suppress
from dataclasses import replace

import pytest

from planner.documents import dump_yaml, parse_yaml, signature
from planner.ir.errors import InputError
from planner.plan import Plan, TokenStage, dump_plan, load_plan
from planner.planning.compiler import compile_plan
from planner.planning.figures import check_figures
from planner.planning.request import Request


@pytest.fixture(scope="module")
def compiled():
    return compile_plan(
        Request("tiny-llava", budget=0.5, tokens="fastv:k=2,r=0.5", utilities="prior")
    )


def _file(plan, change):
    """The plan's file after a change, with a digest that fits it."""
    document = parse_yaml(dump_plan(plan), "it")
    change(document)
    # Without a digest where there is none of such contents.
    with suppress(TypeError):
        document["digest"] = signature(document)
    return dump_yaml(document)


def _set(*keys, value):
    def change(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


# What is wrong with the file by itself.
BROKEN = {
    "a range of a billion heads": (_set("heads", value={0: "0-999999999"}), "beyond the"),
    "a range of a billion groups": (
        _set("mlp", value={0: {"of": 4, "keep": "0-999999999"}}), "beyond the 4"),
    "more groups than neurons": (
        _set("mlp", value={0: {"of": 10**9, "keep": "0"}}), "broken at mlp.0.of"),
    "many long ranges": (
        _set("mlp", value={n: {"of": 10**6, "keep": "0-999998"} for n in range(100)}),
        "beyond the"),
    "a billion layers": (_set("layers", value=10**9), "broken at layers"),
    "a layer that is off and not there": (_set("layers_off", value="999"), "beyond the"),
    "an infinite cost": (_set("cost", "flops", "plan", value=float("inf")), "broken at cost"),
    "NaN": (_set("cost", "flops", "plan", value=float("nan")), "holds NaN"),
    "keys of two types": (_set("provenance", "x", value={1: 2, "a": 3}), "a key is not text"),
    "a list of plans": (_set("tokens", value={}), "broken at tokens"),
    "no layers": (_set("layers", value=0), "broken at layers"),
    "a negative stage": (_set("tokens", 0, "layer", value=-1), "broken at tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_no_model_could_have_is_refused(compiled, tmp_path, name):
    change, message = BROKEN[name]
    (tmp_path / "plan.yaml").write_text(_file(compiled.plan, change))
    with pytest.raises(InputError, match=message):
        load_plan(tmp_path / "plan.yaml")


# What is wrong with it for the model.
OTHERS = {
    "999 layers": (_set("layers", value=999), "is for 999 layers"),
    "one layer fewer": (_set("layers", value=7), "is for 7 layers"),
    "heads that are not there": (_set("heads", value={0: "0-99"}), "heads of layer 0"),
    "heads of a layer that is not there": (_set("heads", value={50: "0"}), "heads.50"),
    "heads of a negative layer": (_set("heads", value={-1: "0"}), "heads.-1"),
    "groups of more than there are": (
        _set("mlp", value={0: {"of": 1000, "keep": "0"}}), "divides"),
    "heads in a layer that is off": (
        lambda d: d.update(layers_off="3", heads={3: "0"}), "narrows layer 3, which it leaves out"),
    "groups in a layer that is off": (
        lambda d: d.update(layers_off="3", mlp={3: {"of": 2, "keep": "0"}}), "leaves out"),
    "of 1000 image tokens": (_set("tokens", 0, "of", value=1000), "was made for 49"),
    "more kept than there are": (_set("tokens", 0, "keep", value=50), "only 49 are left"),
    "rising stages": (
        lambda d: d["tokens"].append(d["tokens"][0] | {"layer": 5, "keep": 40}),
        "only 24 are left"),
    "stages out of order": (
        lambda d: d["tokens"].append(d["tokens"][0] | {"layer": 1}), "token stages"),
    "a stage behind the last layer": (_set("tokens", 0, "layer", value=8), "token stages"),
    "a selector that does not exist": (_set("tokens", 0, "selector", value="best"), "best"),
    "a policy that does not exist": (_set("kv", value="lru:5"), "lru"),
    "a smaller cost": (_set("cost", "flops", "plan", value=1.0), "states 1 for flops"),
    "a larger base": (_set("cost", "kv", "base", value=1e15), "for kv"),
    "another fraction": (_set("cost", "flops", "fraction", value=0.1), "fraction"),
    "a cost without its base": (_set("cost", "kv", value={"plan": 1.0}), "for kv"),
    "a metric of its own": (_set("cost", "joules", value={"plan": 1.0}), "no metric"),
    "a fuller limit": (_set("utilisation", "flops", value=0.99), "uses 0.99"),
    "a tighter budget": (_set("budget", "flops", value="0.4 of base"), "exceeds its budget"),
    "no budget": (_set("budget", "flops", value="x"), "is not an amount"),
    "a smaller gap": (
        lambda d: d["solver"].update(bound=d["solver"]["utility"] + 1), "does not follow"),
    "a bound below": (
        lambda d: d["solver"].update(bound=d["solver"]["utility"] - 1), "does not follow"),
    "optimal by word": (lambda d: d["solver"].update(status="best"), "does not follow"),
    "a gap in words": (lambda d: d["solver"].update(gap="small"), "does not follow"),
    "an unknown device": (_set("provenance", "device", value="abacus"), "unknown device"),
    "an unknown scope": (_set("provenance", "scope", value="all"), "scope 'all'"),
    "a workload in words": (_set("provenance", "batch", value="x"), "batch"),
    "a negative workload": (_set("provenance", "text_tokens", value=-1), "text-tokens"),
    "a huge workload": (_set("provenance", "text_tokens", value=10**18), "text-tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_that_does_not_fit_its_model_is_refused(compiled, tmp_path, name):
    change, message = OTHERS[name]
    (tmp_path / "plan.yaml").write_text(_file(compiled.plan, change))
    loaded = load_plan(tmp_path / "plan.yaml")
    with pytest.raises(InputError, match=message):
        check_figures(loaded, compiled.graph)


def test_a_plan_of_ones_own_is_taken(compiled, tmp_path):
    (tmp_path / "plan.yaml").write_text(dump_plan(compiled.plan))
    loaded = load_plan(tmp_path / "plan.yaml")
    check_figures(loaded, compiled.graph)
    bare = replace(loaded, cost={}, utilisation={}, budget={}, solver={}, provenance={})
    check_figures(bare, compiled.graph)


def test_a_text_model_has_no_image_tokens_to_drop(compiled):
    graph = replace(
        compiled.graph,
        operators=tuple(o for o in compiled.graph if o.part != "vision"),
        properties={**compiled.graph.properties, "image_tokens": 0},
    )
    with pytest.raises(InputError, match="reads no images"):
        compiled.plan.check(graph)


def test_stages_without_provenance_agree_among_themselves(compiled):
    graph = compiled.graph
    plan = Plan(graph.name, str(graph.properties["fingerprint"]), graph.layers)
    replace(plan, tokens=(TokenStage(2, 20, 40), TokenStage(3, 10, 40))).check(graph)
    with pytest.raises(InputError, match="made for 40"):
        replace(plan, tokens=(TokenStage(2, 20, 40), TokenStage(3, 10, 49))).check(graph)


@pytest.mark.parametrize("command", ["inspect", "run"])
def test_the_command_line_says_so(compiled, cli, tmp_path, command):
    (tmp_path / "plan.yaml").write_text(
        _file(compiled.plan, _set("cost", "flops", "plan", value=1.0))
    )
    options = ["-p", "what is this?"] if command == "run" else []
    code, out, err = cli(command, "-m", "tiny-llava", "--plan", "plan.yaml", *options)
    assert (code, out) == (2, "")
    assert "states 1 for flops" in err
    assert "Traceback" not in err
