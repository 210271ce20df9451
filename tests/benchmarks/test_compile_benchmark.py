import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "compile.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_compile", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def fake(benchmark, monkeypatch):
    """Compiles that take no time; the cached ones write the given plan."""

    def replace(cached_plan="plan", repeats=2):
        def once(model, budget, cache, folder, cached):
            folder.mkdir()
            (folder / "plan.yaml").write_text(cached_plan if cached else "plan")
            (folder / "graph.txt").write_text("graph")
            seconds = 1.0 if cached else 10.0
            return benchmark.Run(seconds, 10**9, {"lower": seconds})

        monkeypatch.setattr(benchmark, "compile_once", once)
        monkeypatch.setattr(sys, "argv", ["compile.py", "--repeats", str(repeats), "--json"])

    return replace


def test_medians_stand_beside_targets(benchmark, fake, capsys):
    fake()
    assert benchmark.main() == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs["cold"]["seconds"] == 10.0
    assert runs["cached"]["stages"] == {"lower": 1.0}
    # Nothing is faked about --help: it is a process of its own.
    assert 0.01 < runs["help"]["seconds"] < 30
    assert runs["help"]["peak_bytes"] > 5e6
    assert {kind: run["target_seconds"] for kind, run in runs.items()} == {
        "cold": 25.0, "cached": 3.0, "help": 0.5,
    }  # fmt: skip


def test_it_refuses_to_report_when_plans_differ(benchmark, fake, capsys):
    fake(cached_plan="plan!", repeats=1)
    assert benchmark.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "plan.yaml differs" in err


@pytest.mark.parametrize(("kind", "cached"), [("cold", False), ("cached", True)])
def test_it_refuses_a_run_of_the_wrong_kind(benchmark, monkeypatch, tmp_path, kind, cached):
    document = json.dumps({"from_cache": cached, "seconds": {"lower": 1.0}})
    run = benchmark.Run(3.0, 10**9, {})
    monkeypatch.setattr(benchmark, "execute", lambda command, cache: (run, document))
    arguments = ("llava-7b", "0.65", tmp_path, tmp_path / kind)
    made = benchmark.compile_once(*arguments, cached=cached)
    assert made.stages == {"lower": 1.0, "start, write": 2.0}
    with pytest.raises(benchmark.Invalid, match=f"the run '{kind}'"):
        benchmark.compile_once(*arguments, cached=not cached)
