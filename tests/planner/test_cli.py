import json
import os
import re

import apart
import pytest

from planner import __version__
from planner.cli import execute
from planner.plan import load_plan
from planner.planning.catalog import ALIASES
from planner.planning.graph_cache import cache_folder


def test_planner_alone_says_what_there_is(cli):
    code, out, err = cli()
    assert (code, out) == (2, "")
    for line in ("Usage: planner [OPTIONS]", "  compile "):
        assert any(found.startswith(line) for found in err.splitlines())


def test_compile_writes_a_plan_and_a_graph_and_prints_a_summary(cli, tmp_path):
    code, out, _ = cli("compile", "--model", "llava-7b", "--budget", "0.65", "-o", "out")
    assert code == 0
    assert "0.65" in out
    assert "prior" in out
    assert "optimal" in out
    plan = load_plan(tmp_path / "out/plan.yaml")
    assert plan.model == "llava-7b"
    assert "graph llava-7b" in (tmp_path / "out/graph.txt").read_text()


def test_compile_json_is_one_document(cli):
    code, out, err = cli("compile", "--model", "llava-7b", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert set(document) >= {"plan", "model", "cost", "utilisation", "solver", "seconds"}
    assert set(document["cost"]["flops"]) == {"plan", "base", "fraction"}
    assert set(document["cost"]) == {"flops", "latency", "kv", "memory"}
    assert document["solver"]["status"] == "optimal"
    assert document["solver"]["gap"] <= 1e-9
    assert 0.999 <= document["utilisation"] <= 1


def test_inspect_json_adds_up(cli_json):
    document = cli_json("inspect", "--model", "llava-7b", "--device", "a100-40g")
    rows = document["operators"]
    assert set(document["totals"]) == {"flops", "bytes", "seconds", "kv_bytes", "parameters"}
    for fact in ("flops", "bytes", "kv_bytes", "parameters"):
        assert document["totals"][fact] == sum(row[fact] for row in rows)
    assert {row["bound"] for row in rows} >= {"compute", "memory"}
    # LLaVA-1.5-7B has 7.06 billion parameters.
    assert 7.0e9 < document["totals"]["parameters"] < 7.1e9


def test_inspect_under_a_plan_costs_what_the_plan_says(cli_json):
    compiled = cli_json("compile", "--model", "llava-7b", "--budget", "0.5", "-o", "out")
    document = cli_json("inspect", "--model", "llava-7b", "--plan", "out/plan.yaml")
    assert document["totals"]["flops"] == compiled["cost"]["flops"]["plan"]


@pytest.mark.parametrize("by", ["operator", "layer", "kind"])
def test_inspect_tables(cli, by):
    code, out, _ = cli("inspect", "--model", "llava-7b", "--by", by)
    assert code == 0
    assert "total" in out


def test_models_devices_and_version(cli, cli_json):
    assert cli("--version")[:2] == (0, f"planner {__version__}\n")
    aliases = {"llava-7b", "llava-13b", "mipha-3b", "tiny-llava", "deep-llava"}
    assert set(cli_json("models")["aliases"]) == aliases
    names = [d["name"] for d in cli_json("devices")["devices"]]
    assert {"v100", "a100-40g", "h200"} <= set(names)
    assert "v100" in cli("devices")[1]
    assert "mipha-3b" in cli("models")[1]


def test_inspect_counts_as_published_tables_do(cli, cli_json):
    """AdaLLaVA's 81 ms on a V100 (Table 1), Dynamic-LLaVA's 10.1 TFLOP (Table 10)."""
    asked = ("inspect", "--model", "llava-7b", "--text-tokens", "68")
    document = cli_json(*asked, "--device", "v100", "--convention", "llm-viewer")
    assert document["convention"] == "llm-viewer"
    assert f"{document['totals']['seconds'] * 1e3:.0f}" == "81"
    assert sum(row["flops"] for row in document["operators"]) == document["totals"]["flops"]
    step = cli_json(*asked, "--step", "decode", "--new-tokens", "1", "--convention", "llm-viewer")
    assert step["totals"]["kv_bytes"] == 32 * 644 * 2 * 4096 * 2
    found = cli_json(*asked, "--convention", "dynamic-llava")["totals"]["flops"]
    assert f"{found / 1e12:.1f}" == "10.1"
    code, out, _ = cli(*asked, "--convention", "llm-viewer", "--by", "kind")
    assert (code, "as llm-viewer" in out, "softmax" in out) == (0, True, True)
    code, _, err = cli(*asked, "--convention", "llm-viewer", "--graph")
    assert (code, "without --convention" in err) == (2, True)


def test_compile_counts_as_published_tables_do(cli, cli_json):
    asked = ("compile", "--model", "llava-7b", "--switches", "adallava-l", "--budget", "0.6")
    asked += ("--text-tokens", "68", "--device", "v100", "-o", "out", "--convention", "llm-viewer")
    found = cli_json(*asked)["convention"]
    assert found["name"] == "llm-viewer"
    # 19 of 32 layers.
    assert f"{found['cost']['flops']['plan'] / 1e12:.2f}" == "5.08"
    assert f"{found['cost']['latency']['plan'] * 1e3:.1f}" == "48.4"
    code, out, _ = cli(*asked)
    assert (code, "as llm-viewer counts, latency: 48.42 ms of 81.35 ms" in out) == (0, True)


def test_inspect_after_passes(cli_json):
    dense = cli_json("inspect", "--model", "tiny-llava")
    passes = "drop-dead,fuse-projections,fuse-norm"
    fused = cli_json("inspect", "--model", "tiny-llava", "--passes", passes)
    assert len(fused["operators"]) < len(dense["operators"])
    assert fused["totals"]["bytes"] < dense["totals"]["bytes"]
    assert "norm_linear" in {operator["kind"] for operator in fused["operators"]}


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_compiles(cli_json, alias):
    document = cli_json("compile", "--model", alias, "--budget", "0.7")
    assert document["cost"]["flops"]["fraction"] <= 0.7


def test_models_check_reports_why_not(cli_json):
    arguments = ["--only", "paligemma", "--only", "evolla"]
    found = {m["model_type"]: m for m in cli_json("models", "--check", *arguments)["models"]}
    assert set(found["paligemma"]["answers"].values()) == {"yes"}
    assert found["paligemma"]["sites"] == {"layer": 18, "heads": 18, "mlp": 18}
    assert found["evolla"]["answers"]["lowered"] == "no"
    assert found["evolla"]["remarks"]


BAD = [
    (["compile", "--model", "no-such-model"], "unknown model"),
    (["compile", "--model", "./nowhere"], "no folder"),
    (["compile", "--model", "llava-7b", "--budget", "0"], "more than 0"),
    (["compile", "--model", "llava-7b", "--budget", "1.5"], "not an amount|at most 1|unit"),
    (["compile", "--model", "llava-7b", "--budget", "nan"], "nan"),
    (["compile", "--model", "llava-7b", "--budget", "49 parsecs"], "parsecs"),
    (["compile", "--model", "llava-7b", "--budget", "0.001"], "smallest possible"),
    (
        ["compile", "--model", "llava-7b", "--budget", "latency=9ms", "--device", "tpu"],
        "unknown dev",
    ),
    (["compile", "--model", "llava-7b", "--switches", "wheels"], "wheels"),
    (["compile", "--model", "llava-7b", "--utilities", "absent.npz"], "no utilities file"),
    (["compile", "--model", "llava-7b", "--text-tokens", "-3"], "at least 0"),
    (["compile", "--model", "llava-7b", "--batch", "0"], "at least 1"),
    (["compile", "--model", "llava-7b", "--mlp-groups", "0"], "at least 1"),
    (["compile", "--model", "llava-7b", "--time-limit", "0"], "more than 0"),
    (["compile", "--model", "llava-7b", "-o", "file/below"], "cannot write"),
    (["compile", "--model", "llava-7b", "--scope", "moon"], "scope"),
    (["compile", "--model", "file"], "is a file"),
    (["compile", "--model", "broken"], "truncated or not JSON"),
    (["compile", "--model", "untyped"], "model_type"),
    (["compile", "--model", "strange"], "does not know"),
    (["compile"], "model"),
    (["compile", "--model", "llava-7b", "--wrong-flag"], "wrong-flag"),
    (["inspect", "--model", "llava-7b", "--plan", "absent.yaml"], "no plan"),
    (["inspect", "--model", "llava-7b", "--plan", "cut.yaml"], "truncated|not a plan"),
    (["inspect", "--model", "llava-7b", "--by", "colour"], "colour"),
    (["inspect", "--model", "llava-7b", "--passes", "fold"], "unknown pass 'fold'"),
    (["inspect", "--model", "llava-7b", "--device", "abacus"], "unknown device"),
    (["models", "--check", "--only", "nothing"], "nothing"),
    (["dance"], "dance"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=lambda v: " ".join(v)[:60])
def test_bad_input_is_one_sentence_and_exit_2(cli, tmp_path, arguments, expected):
    (tmp_path / "file").write_text("x")
    (tmp_path / "cut.yaml").write_text("planner_plan: [1")
    for name, text in (("broken", "{"), ("untyped", "{}"), ("strange", '{"model_type": "zzz"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(expected, err)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_plan_for_another_model_is_refused(cli):
    assert cli("compile", "--model", "mipha-3b", "-o", "out", "-q")[0] == 0
    code, _, err = cli("inspect", "--model", "llava-7b", "--plan", "out/plan.yaml")
    assert code == 2
    assert "mipha-3b" in err
    assert "llava-7b" in err


def test_a_corrupt_cache_entry_is_rebuilt(cli, cli_json):
    first = cli_json("inspect", "--model", "tiny-llava")
    entries = sorted((cache_folder() / "graphs").iterdir(), key=os.path.getmtime)
    for entry in entries:
        text = entry.read_text()
        if "tiny-llava" in text[:2000]:
            entry.write_text(text[: len(text) // 2])
    assert cli_json("inspect", "--model", "tiny-llava") == first


def test_two_processes_share_the_cache(tmp_path):
    place = {"folder": tmp_path, "environment": {"PLANNER_CACHE": str(tmp_path / "cache")}}
    command = ["-m", "planner", "compile", "--model", "tiny-llava", "--json", "-o"]
    running = [apart.start(*command, tmp_path / str(i), **place) for i in range(2)]
    done = [program.finish() for program in running]
    assert [program.returncode for program in done] == [0, 0], done
    plans = [(tmp_path / str(i) / "plan.yaml").read_bytes() for i in range(2)]
    assert plans[0] == plans[1]
    assert not list((tmp_path / "cache").rglob(".*"))


def test_quiet_prints_nothing(cli):
    assert cli("compile", "--model", "tiny-llava", "-q") == (0, "", "")


def test_print_between_passes_shows_every_pass(cli):
    code, _, err = cli("compile", "--model", "tiny-llava", "--print-between-passes", "-q")
    assert code == 0
    for name in ("specialise", "narrow-tokens"):
        assert f"-- {name}" in err


def test_every_command_takes_json_quiet_and_verbose():
    from typer.main import get_command

    from planner.cli.app import app

    for name, command in get_command(app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert options >= {"--json", "-q", "-v"}, name


def test_the_options_of_a_request_are_its_fields():
    from dataclasses import fields

    from typer.main import get_command

    from planner.cli.app import app
    from planner.planning.request import Request

    defaults = {p.name: p.default for p in get_command(app).commands["compile"].params}
    assert all(defaults[f.name] in (None, f.default) for f in fields(Request) if f.name != "model")


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "-m", "tiny-llava", "--convention", "nope"], ["eval", "-m", "x", "--split", "no"]],
)
def test_a_choice_that_is_none_is_told_in_words_of_ours(capsys, arguments):
    assert execute(arguments) == 2
    said = capsys.readouterr().err
    assert f"'{arguments[-1]}' is not one of" in said
    assert "Value error" not in said
