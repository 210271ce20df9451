"""CONTRIBUTING.md's guides to aliases, selectors and commands, each followed with a dummy."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch
import typer
from small_llava import write_small_llava
from typing_extensions import override

import planner
from planner.api import kept_image_tokens
from planner.cli.app import app
from planner.cli.command_options import command
from planner.cli.console import Console
from planner.ir.errors import InputError
from planner.loading import load_model, noise_image, prompt_inputs
from planner.models.tokens.selectors import DecoderInputs, DecoderSelection, select_tokens
from planner.planning import catalog
from planner.planning.catalog import ALIASES, Alias
from planner.planning.request import Request
from planner.planning.selectors import SELECTORS
from planner.planning.selectors.arguments import Count
from planner.planning.selectors.in_decoder import FromLayer


def test_add_a_model_alias(cli, cli_json, monkeypatch, tmp_path):
    configs = tmp_path / "aliases"
    shutil.copytree(catalog.CONFIGS, configs)
    config = json.loads((configs / "llava-7b.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    # 1. and 2.
    (configs / "dummy-1b.json").write_text(json.dumps(config))
    monkeypatch.setattr(catalog, "CONFIGS", configs)
    monkeypatch.setitem(ALIASES, "dummy-1b", Alias("a dummy", "nobody/dummy-1b"))
    assert "dummy" in cli_json("models")["aliases"]["dummy-1b"]
    made = cli_json("compile", "--model", "dummy-1b", "--budget", "0.7")
    assert made["kept"]["layers"]["of"] == 4
    assert made["cost"]["flops"]["fraction"] <= 0.7
    code, _, err = cli("run", "--model", "dummy-1b", "--prompt", "?")
    assert (code, "'dummy-1b' cannot be loaded" in err) == (2, True)


@dataclass(frozen=True)
class First(FromLayer):
    """Keep the first image tokens of each sample."""

    name = "first"
    keep: Count
    k: int = 1

    @classmethod
    @override
    def at(cls, layer: int, keep: int, of: int) -> First:
        return cls(keep, layer)

    @override
    def counts(self, tokens: int) -> tuple[int | None, ...]:
        return (min(self.keep, tokens),)


@select_tokens.register(First)
def first(selector: First, inputs: DecoderInputs, layer: int) -> DecoderSelection:
    return DecoderSelection(~inputs.image | (inputs.image.cumsum(1) <= selector.keep))


def test_add_a_selector(cli, cli_json, monkeypatch, tmp_path):
    monkeypatch.setitem(SELECTORS, "first", First)
    options = ("--model", "tiny-llava", "--budget", "1", "--switches", "tokens", "--tokens")
    made = cli_json("compile", *options, "first:keep=9,k=2")
    assert made["kept"]["tokens"]["kept"] == 9
    assert cli_json("compile", *options, "uniform:keep=9,k=2")["cost"] == made["cost"]
    code, _, err = cli("compile", *options, "first:keep=-1")
    assert (code, "keep is a count from 0 on" in err) == (2, True)
    # What it computes is what runs.
    model, processor, _ = load_model(str(write_small_llava(tmp_path / "model")))
    inputs = prompt_inputs(model, processor, "what is this ?", noise_image())
    planner.compile(model, 1.0, tokens="first:keep=5,k=2", switches="tokens")
    with torch.inference_mode():
        model(**inputs)
    assert kept_image_tokens(model) == {2: [5]}


@command("model", "budget")
def dummy_command(
    request: Request,
    console: Console,
    times: Annotated[int, typer.Option("--times", help="How often.")] = 1,
) -> None:
    """Say what was asked for."""
    if times < 1:
        raise InputError("--times must be at least 1")
    console.show(
        {"model": request.model, "budget": request.budget},
        lambda: print(" ".join([request.model] * times)),
    )


@pytest.fixture
def _dummy_command():
    app.command("dummy")(dummy_command)
    yield
    app.registered_commands.pop()


@pytest.mark.usefixtures("_dummy_command")
def test_add_a_command(cli, cli_json):
    assert cli("dummy", "-m", "x", "--times", "2") == (0, "x x\n", "")
    assert cli("dummy", "-m", "x", "-q") == (0, "", "")
    assert cli_json("dummy", "-m", "x") == {"model": "x", "budget": 0.65}
    assert cli_json("dummy", "-m", "x", "-b", "0.5", "-b", "kv=1MiB")["budget"] == [
        "0.5",
        "kv=1MiB",
    ]
    assert cli("dummy", "-m", "x", "--times", "0") == (
        2,
        "",
        "planner: --times must be at least 1\n",
    )
    code, _, err = cli("dummy")
    assert (code, "--model" in err) == (2, True)
