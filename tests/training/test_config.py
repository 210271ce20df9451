"""A setting that no run can have is one sentence, before anything is loaded or written."""

import re

import pytest

from planner.cli import execute as run
from planner.ir.errors import InputError
from planner.training.config import CONFIGS
from planner.training.recipes import RECIPES, load_recipe

# A configuration of each recipe.
OF_RECIPE = {
    "tiny-llava": "tiny-llava",
    "adallava": "adallava-l",
    "dynamic-llava": "dynamic-llava",
    "fine-tuning": "voco",
    "joined-llava": "smol-llava",
    "unified": "unified",
}


def kinds_of(schema):
    """JSON types of a field that are numbers, or ``array`` and ``object`` of numbers."""
    for choice in schema.get("anyOf", [schema]):
        kind = choice.get("type")
        inner = choice.get("items") if kind == "array" else choice.get("additionalProperties")
        numbers = [kind, inner.get("type") if isinstance(inner, dict) else None]
        if {"integer", "number"} & set(numbers):
            yield kind


def numeric_fields():
    for recipe, (schema, _) in RECIPES.items():
        for name, field in schema.model_json_schema()["properties"].items():
            for kind in kinds_of(field):
                yield recipe, name, kind


def refused(recipe, override, message):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(CONFIGS / f"{OF_RECIPE[recipe]}.yaml", [override])
    assert "\n" not in str(caught.value)


def test_every_recipe_has_a_configuration_here():
    assert set(OF_RECIPE) == set(RECIPES)


@pytest.mark.parametrize(("recipe", "name", "kind"), list(numeric_fields()))
def test_every_number_has_its_range(recipe, name, kind):
    form = {"array": "[{}]", "object": "{{text: {}}}"}.get(kind, "{}")
    for number in (
        "-1",
        ".inf",
        "inf",
        "nan",
        "-1e-9",
        "1" + "0" * 18 if kind == "integer" else "-.inf",
    ):
        refused(recipe, f"{name}={form.format(number)}", f'"{name}[.\\w]*": ')
    refused(recipe, f"{name}={form.format('.nan')}", "holds NaN")


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        *[
            ("adallava", f"{name}=0", f'"{name}": .*greater than')
            for name in (
                "max_steps", "batch_size", "save_steps", "logging_steps", "scenes",
                "max_text_tokens", "learning_rate", "scheduler_learning_rate", "label_steps",
                "gradient_accumulation_steps", "text_tokens",
            )
        ],
        ("adallava", "description_share=2", "less than or equal to 1"),
        ("adallava", "warmup_ratio=1.5", "less than or equal to 1"),
        ("adallava", "adam_beta2=2", "less than 1"),
        ("adallava", "seed=4294967296", "less than 4294967296"),
        ("adallava", "family_weights={}", "some family must have a weight above 0"),
        ("adallava", "family_weights={text: 0}", "some family must have a weight above 0"),
        ("adallava", "family_weights={text: 1e308, count: 1e308}", "their sum be finite"),
        ("adallava", "family_weights={cats: 1}", 'unknown family "cats"; known: existence'),
        ("adallava", "turns=[]", "at least 1 item"),
        ("adallava", "lr_schedule=steep", "'linear'"),
        ("adallava", "output_dir=''", "at least 1 character"),
        ("adallava", "output_dir=", "valid string"),
        ("adallava", "export_dir=''", "at least 1 character"),
        ("adallava", "estimator=gumbel:temperature=-1", "temperature"),
        ("adallava", "least_budget=1.5", "less than or equal to 1"),
        ("adallava", "conversations=c.json", "need their image_folder"),
        ("unified", "method=grpo:clip=-1", "clip"),
        ("unified", "reward=taste", "'nll' or 'correct'"),
        ("dynamic-llava", "predictors={mask_loss_weight: .inf}", "mask_loss_weight"),
        ("dynamic-llava", "predictors={vision_keep_rate: 2}", "vision_keep_rate"),
        ("tiny-llava", "heads=3", "hidden_size=128 does not divide into heads=3"),
        ("tiny-llava", "vision_heads=3", "vision_hidden_size=128 does not divide"),
        ("tiny-llava", "later_stages={deep: {learning_rate: -1}}", 'stage "deep": "learning_rate"'),
        ("tiny-llava", "later_stages={deep: {layers: 12}}", "grow to a multiple"),
    ],
)  # fmt: skip
def test_a_value_that_no_run_can_have_is_one_sentence(recipe, override, message):
    refused(recipe, override, message)


def test_budgets_are_in_order():
    with pytest.raises(InputError, match=r"least_budget=0\.9 and most_budget=0\.8"):
        load_recipe(CONFIGS / "unified.yaml", ["least_budget=0.9", "most_budget=0.8"])


def test_a_key_that_is_there_twice_is_refused(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text((CONFIGS / "adallava-l.yaml").read_text() + "max_steps: 2\n")
    assert run(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"planner: the configuration '.*' has the key max_steps twice\n", said)
