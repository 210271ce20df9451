"""Options that nobody means: a sentence at once, from Python and the command line alike."""

import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from planner.backend.compile_options import Options
from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.compiler import compile_plan
from planner.planning.graph_cache import lowered_graph
from planner.planning.request import Request
from planner.planning.switches import with_switches
from planner.progress import progress_bar

NAN, INF = float("nan"), float("inf")

BUDGETS = [
    "flops=1e99999999", "1e-99999999", "flops=" + "9" * 100_000, "0." + "0" * 100_000 + "1",
    "flops=1e99PFLOP", "latency=-1s", "kv=0", "flops=nan", "flops=inf", "", "=", "=1", "flops=",
    "kv=１GiB", "flops=1_000_000", 0, -1, 2, NAN, INF, -INF, 10**5000, -(10**5000), True, None,
    [], {}, {"flops": 10**5000}, {"kv": None}, ["0.5", "0.6"], [[0.5]], object(), b"0.5", 0.5j,
    Fraction(1, 2), {0.5}, "x" * 100_000, {"x" * 100_000: 1},
]  # fmt: skip


@pytest.mark.parametrize("value", BUDGETS, ids=lambda value: type(value).__name__)
def test_a_budget_that_is_none_is_one_sentence_at_once(value):
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        Budget.of(value)
    assert time.perf_counter() - started < 0.5
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["1e-30", "flops=1e60", "kv=1e70GiB", 1e-300, 5e-324, "100%"])
def test_a_budget_at_the_edge_is_one(value):
    described = Budget.of(value).describe()
    assert len(described) == 1


OPTIONS = [
    ("batch", "x", "batch"),
    ("batch", 1.5, "batch"),
    ("batch", True, "batch"),
    ("batch", 0, "at least 1"),
    ("batch", 10**30, "at most"),
    ("text_tokens", -1, "at least 0"),
    ("text_tokens", NAN, "text-tokens"),
    ("image_tokens", "576", "image-tokens"),
    ("new_tokens", 10**400, "at most"),
    ("mlp_groups", 0, "at least 1"),
    ("mlp_groups", -3, "at least 1"),
    ("mlp_groups", 1.0, "mlp-groups"),
    ("mlp_groups", 10**12, "too few for"),
    ("time_limit_seconds", NAN, "more than 0"),
    ("time_limit_seconds", -1, "more than 0"),
    ("time_limit_seconds", 0.0, "more than 0"),
    ("time_limit_seconds", "60", "time-limit-seconds"),
    ("switches", 5, "switches"),
    ("switches", "", "unknown switches"),
    ("switches", "all,all", "unknown switches"),
    ("tokens", "fastv:k=999", "layer 999"),
    ("tokens", "fastv:k=" + "9" * 80, "k="),
    ("tokens", ["fastv"], "tokens"),
    ("kv", "h2o:heavy=nan,recent=0.1", "heavy"),
    ("kv", "h2o:heavy=2", "heavy"),
    ("utilities", 3, "utilities"),
    ("utilities", "/dev/zero", "not a file"),
    ("utilities", "a\0b", "cannot be read"),
    ("device", "abacus", "unknown device"),
    ("device", 7, "device"),
    ("scope", "all", "unknown scope"),
    ("scope", "", "unknown scope"),
    ("uniform", "yes", "uniform"),
    ("model", None, "model"),
    ("model", "a\0b", "unknown model"),
    ("trust_remote_code", 1, "trust-remote-code"),
]


@pytest.fixture(scope="module", autouse=True)
def _lowered():
    """Lowering is not what is timed."""
    lowered_graph(find_model("tiny-llava"))


@pytest.mark.parametrize(("name", "value", "message"), OPTIONS)
def test_an_option_that_is_none_is_one_sentence_at_once(name, value, message):
    started = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        compile_plan(Request(**({"model": "tiny-llava"} | {name: value})))
    assert time.perf_counter() - started < 2
    assert len(str(caught.value)) < 400


WORKLOADS = [
    {"text_tokens": 10**6, "batch": 10**7},
    {"text_tokens": 10**8, "batch": 10**8},
    {"new_tokens": 10**8, "batch": 10**8},
    {"image_tokens": 10**8, "batch": 10**5},
]


@pytest.mark.parametrize("load", WORKLOADS)
@pytest.mark.parametrize("budget", [0.5, "kv=0.5", "memory=1e30GiB"])
def test_a_workload_too_large_to_be_priced_is_one_sentence(load, budget):
    with pytest.raises(InputError, match="too large to be priced"):
        compile_plan(Request("tiny-llava", budget=budget, **load))


def test_a_large_workload_is_priced():
    plan = compile_plan(
        Request("tiny-llava", budget="flops=1e30", text_tokens=10**5, batch=64)
    ).plan
    assert plan.is_dense
    assert plan.cost["flops"]["plan"] > 1e15


def test_commands_and_the_backend_say_the_same(cli):
    for options, message in [
        (["--time-limit", "nan"], "more than 0"),
        (["--time-limit", "-1"], "more than 0"),
        (["--mlp-groups", "0"], "at least 1"),
        (["--budget", "flops=1e99999999"], "not an amount"),
        (["--text-tokens", "1000000", "--batch", "10000000"], "too large"),
        (["--text-tokens", "9" * 5000], "int"),
        (["-o", "a\0b"], "null byte"),
        (["--budget", "0.5", "--tokens", "fastv:k=" + "9" * 5000], "k is a whole number"),
    ]:
        code, out, err = cli("compile", "-m", "tiny-llava", *options)
        assert (code, out) == (2, ""), err
        assert re.search(message, err)
        assert err.count("\n") == 1
        assert len(err) < 1000
    for options in ({"batch": "x"}, {"mlp_groups": 0}, {"time_limit_seconds": NAN}):
        with pytest.raises(InputError):
            Options.parse(options)


BESIDE_ANOTHER = [
    ("run --plan P --budget 0.5", "--plan is a whole plan: leave out --budget"),
    ("run --plan P --switches layers --device h200", "leave out --switches, --device"),
    ("run --plan P --scheduler adallava-h", "either a --plan or a --scheduler"),
    ("run --scheduler adallava-h --kv h2o:heavy=0.2,recent=0.2", "leave out --kv"),
    ("run --scheduler adallava-h --utilities prior", "leave out --utilities"),
    ("compile --scheduler adallava-h --keep layer.0 --uniform", "leave out --keep, --uniform"),
    ("compile --scheduler adallava-h --mlp-groups 7", "leave out --mlp-groups"),
    ("compile --scheduler adallava-h --time-limit 1 --scope model", "out --scope, --time-limit"),
    ("compile --scheduler adallava-h --kv h2o:heavy=0.2,recent=0.2", "leave out --kv"),
    ("compile --scheduler adallava-h --recover refit", "leave out --recover"),
    ("compile --scheduler adallava-h --print-between-passes", "--print-between-passes"),
    ("compile --samples 3", "--samples is of --images or --text"),
    ("eval --scheduler adallava-h --switches layers", "leave out --switches"),
    ("serve --scheduler adallava-h --switches layers --budgets 1", "leave out --switches"),
    ("serve --replicas 2", "give --ray too"),
]


@pytest.mark.parametrize(("command", "message"), BESIDE_ANOTHER)
def test_an_option_that_would_say_nothing_is_refused(cli, tmp_path, command, message):
    name, *options = command.split()
    asked = {"run": ("--prompt", "how"), "compile": ("-o", "out")}.get(name, ())
    code, out, err = cli(name, "-m", "tiny-llava", *asked, *options)
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--only", "llava"], ["-o", "table.md"]])
def test_options_of_a_check_are_not_overlooked_without_it(cli, options):
    code, out, err = cli("models", *options)
    assert (code, out) == (2, "")
    assert "give it too" in err


@pytest.mark.parametrize("groups", [0, -1])
def test_groups_are_at_least_one_whoever_asks(groups):
    graph = lowered_graph(find_model("tiny-llava"))[0]
    with pytest.raises(InputError, match="at least 1"):
        with_switches(graph, groups)


@pytest.mark.parametrize("counts", [{"image_tokens": 1.0}, {"image_tokens": None}])
def test_a_workload_has_whole_counts(counts):
    with pytest.raises(InputError, match="whole number"):
        Workload(**counts)


@pytest.mark.parametrize("command", [["devices"], ["models"], ["devices", "--json"]])
def test_a_full_disk_is_one_sentence(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "planner", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_what_is_not_installed_is_said_before_any_work(cli, tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("planner.loading.load_model", refused)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = cli("labels", "-m", "tiny-llava", "-o", "labels.parquet")
    assert code == 2
    assert "pip install 'planner[train]'" in err
    monkeypatch.setitem(sys.modules, "accelerate", None)
    (tmp_path / "train.yaml").write_text("recipe: adallava\n")
    code, _, err = cli("train", "train.yaml")
    assert code == 2
    assert "needs accelerate" in err


def test_a_plan_that_cannot_be_written_leaves_its_graph_as_it_was(cli, tmp_path):
    (tmp_path / "out" / "plan.yaml").mkdir(parents=True)
    (tmp_path / "out" / "graph.txt").write_text("mine")
    code, _, err = cli("compile", "--model", "tiny-llava", "-o", "out")
    assert (code, err.count("\n")) == (2, 1)
    assert (tmp_path / "out" / "graph.txt").read_text() == "mine"
    assert len([*(tmp_path / "out").iterdir()]) == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--budget", "0.01"],
        ["--budget", "7"],
        ["--tokens", "fastv:r=2"],
        ["--tokens", "dynamic-llava:nowhere"],
        ["--kv", "nothing"],
        ["--device", "nothing"],
        ["--switches", "adallava-l", "--budget", "0.3"],
    ],
)
def test_a_compile_that_is_refused_leaves_nothing(cli, tmp_path, options):
    code, _, err = cli("compile", "--model", "tiny-llava", *options, "-o", "out/here")
    assert code == 2
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", ["-1", str(2**32), str(2**70)])
@pytest.mark.parametrize(
    "command",
    [
        ("heal", "--plan", "nothing", "-o", "out", "--text", "nothing"),
        ("labels", "-o", "labels.parquet"),
        ("eval",),
        ("calibrate-utilities", "-o", "u.npz"),
    ],
)
def test_a_seed_that_generators_do_not_take_is_refused(cli, tmp_path, command, seed):
    code, out, err = cli(*command, "--model", "tiny-llava", "--seed", seed)
    assert (code, out) == (2, "")
    assert "Invalid value for '--seed': Input should be" in err
    assert not list(tmp_path.iterdir())


def test_a_progress_bar_that_never_began_prints_nothing(capsys):
    with pytest.raises(InputError), progress_bar("work"):
        raise InputError("refused")
    assert capsys.readouterr().err == ""
    with progress_bar("work") as shown:
        shown(1, 2)
        shown(2, 2)
    assert "2/2" in capsys.readouterr().err
