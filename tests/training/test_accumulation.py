"""A step of several batches has the mean of what they lose, whether they divide it or the step."""

import json

import pytest
from small_llava import write_small_llava

from planner.training import adallava, sparsification, unified

COMMON = {
    "max_steps": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_llava(tmp_path_factory.mktemp("base"))


def deterministic(values):
    config = adallava.AdaLlavaConfig(**values, estimator="deterministic:weight=9")
    return adallava.build_trainer(config)


def by_tokens(values):
    return adallava.build_trainer(adallava.AdaLlavaConfig(**values))


def policy(values):
    config = unified.UnifiedConfig(
        **values, switches="tokens,layers:scorer=all", method="reinforce"
    )
    return adallava.build_trainer(config, unified.learner)


def sparse(values):
    values = {**values, "predictors": {"inner_width": 8, "output_text_len_for_training": 4}}
    return sparsification.build_trainer(sparsification.DynamicLlavaConfig(**values))


@pytest.mark.parametrize("build", [by_tokens, deterministic, policy, sparse])
def test_a_steps_loss_is_that_of_its_batches(base, tmp_path, build):
    trainer, model, _ = build({**COMMON, "model": str(base), "output_dir": str(tmp_path)})
    losses = []
    model.register_forward_hook(lambda _, args, output: losses.append(output["loss"].item()))
    trainer.run()
    last = losses[-2:]
    state = json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())
    # Of batches that are divided by the tokens of the step the sum is the mean already.
    expected = sum(last) if build is by_tokens else sum(last) / 2
    assert state["log_history"][0]["loss"] == pytest.approx(expected, rel=1e-3)
