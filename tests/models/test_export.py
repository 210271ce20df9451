"""Exported checkpoints: equal to the planned model, plain where they can be, whole or not there."""

import json
import re
from dataclasses import replace

import pytest
import torch
from families import TEXT, randomise
from plans import plan_of
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, LlavaConfig

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.export import export, load
from planner.models.running.skipping import obeying
from planner.plan import TokenStage, load_plan
from planner.planning.catalog import find_model

UNIFORM = {
    "layers_off": (0,),
    "heads": {1: (1,), 2: (0,), 3: (0,)},
    "mlp": {1: (0, 2), 2: (1, 2), 3: (0, 1)},
    "mlp_switches": {1: 3, 2: 3, 3: 3},
}
MIXED = {"layers_off": (1,), "heads": {0: (), 2: (1,)}, "mlp": {0: (0, 3, 4), 2: ()}}
FIRST_OFF = {"layers_off": (0,), "heads": {3: (0,)}, "mlp": {2: (1,)}}


def generated(model, inputs):
    out = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits)


def error(actual, expected):
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max()


@pytest.mark.parametrize("switches", [UNIFORM, MIXED, FIRST_OFF], ids=["uniform", "mixed", "first"])
def test_the_export_generates_what_the_planned_model_does(llava, tmp_path, switches):
    family, graph = llava
    plan = plan_of(graph, **switches)
    # Padding on the left, and a cache: what a layer without keys could get wrong.
    inputs = family.inputs(batch=2, before=(2, 5))
    with obeying(family.model, graph, plan):
        expected = generated(family.model, inputs)
    done = export(family.model, graph, plan, tmp_path / "out", inputs)
    assert done.plain == (switches is UNIFORM)
    assert done.error <= 1e-5
    assert done.parameters < done.base_parameters
    assert error(generated(load(tmp_path / "out"), inputs), expected) <= 1e-5
    assert load_plan(tmp_path / "out/plan.yaml") == plan
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_stock_transformers_loads_a_plain_export(llava, tmp_path):
    family, graph = llava
    inputs = family.inputs()
    plan = plan_of(graph, **UNIFORM)
    assert export(family.model, graph, plan, tmp_path / "out", inputs).plain
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = loaded.config.text_config
    sizes = (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads)
    assert (*sizes, text.head_dim, text.intermediate_size) == (3, 2, 1, 16, 64)
    assert loaded.config.planner_plan.startswith("plan.yaml, sha256 ")
    with torch.no_grad(), obeying(family.model, graph, plan):
        expected = family.model(**inputs).logits
    with torch.no_grad():
        assert error(loaded(**inputs).logits, expected) <= 1e-5


def test_stock_transformers_refuses_a_planned_export(llava, tmp_path):
    family, graph = llava
    export(family.model, graph, plan_of(graph, **MIXED), tmp_path / "out", family.inputs())
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    record = json.loads((tmp_path / "out/planner.json").read_text())
    assert record["planner_plan"].startswith("plan.yaml, sha256 ")


# Fused projections and no KV sharing; sliding windows and shared embeddings; parallel blocks with
# biases; image features that enter behind early layers; rotary positions in three sections.
@pytest.mark.parametrize(
    "each_family", ["phi", "gemma3", "qwen3_vl", "qwen2_5_vl", "qwen3"], indirect=True
)
def test_every_kind_of_decoder_is_exported(each_family, tmp_path):
    family, graph = each_family
    inputs = family.inputs(batch=2, before=(2, 4))
    plans = [plan_of(graph, layers_off=(1,)), plan_of(graph, **MIXED)]
    found = [
        export(family.model, graph, plan, tmp_path / str(number), inputs)
        for number, plan in enumerate(plans)
    ]
    # Which layer a feature enters behind is fixed, so dropping that layer has no plain form.
    assert found[0].plain == (family.name != "qwen3_vl")
    assert not found[1].plain
    for done in found:
        assert done.error <= 1e-5
        assert done.parameters < done.base_parameters
    with obeying(family.model, graph, plans[1]):
        expected = generated(family.model, inputs)
    assert error(generated(load(tmp_path / "1"), inputs), expected) <= 1e-5


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({"heads": {0: (1,)}}, "different numbers of KV groups.*--uniform"),
        ({"mlp": dict.fromkeys(range(4), ())}, "keeps no MLP neurons"),
        ({"layers_off": (0, 1, 2, 3)}, "no layer on"),
    ],
)
def test_why_a_plan_is_not_plain(llava, tmp_path, switches, reason):
    family, graph = llava
    plan = plan_of(graph, **switches)
    done = export(family.model, graph, plan, tmp_path / "out", family.inputs())
    assert not done.plain
    assert re.search(reason, done.why_not)
    assert "\n" not in done.why_not


def test_head_counts_that_the_stock_config_refuses(tmp_path):
    # Three heads of sixteen do not divide a hidden size of 64.
    config = LlamaConfig(**(TEXT | {"num_key_value_heads": 4, "num_hidden_layers": 2}))
    model = randomise(LlamaForCausalLM(config), seed=0)
    graph = lower_model(model, "llama")
    plan = plan_of(graph, heads={0: (0, 1, 3), 1: (1, 2, 3)})
    ids = torch.arange(3, 12)[None]
    done = export(model, graph, plan, tmp_path / "out", {"input_ids": ids})
    assert not done.plain
    assert "multiple of the number of attention heads" in done.why_not


def test_token_stages_stay_a_note(llava, tmp_path):
    family, graph = llava
    plan = plan_of(graph, layers_off=(1,), tokens=(TokenStage(2, 4, 16),))
    inputs = family.inputs()
    assert export(family.model, graph, plan, tmp_path / "out", inputs).plain
    assert load_plan(tmp_path / "out/plan.yaml").tokens == plan.tokens
    with torch.no_grad(), obeying(family.model, graph, replace(plan, tokens=())):
        expected = family.model(**inputs).logits
    with torch.no_grad():
        assert error(load(tmp_path / "out")(**inputs).logits, expected) <= 1e-5


def test_weights_are_stored_in_the_precision_asked_for(llava, tmp_path):
    family, graph = llava
    model, inputs = family.model, family.inputs()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = {}
    try:
        # As after loading a checkpoint of half precision: every number fits it.
        model.load_state_dict({n: v.half().float() for n, v in original.items()})
        for switches, name in ((UNIFORM, "uniform"), (MIXED, "mixed")):
            for dtype in (None, torch.float16):
                folder = tmp_path / f"{name}-{dtype}"
                plan = plan_of(graph, **switches)
                export(model, graph, plan, folder, inputs, stored_dtype=dtype)
                sizes[dtype] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
                assert load(folder).dtype == torch.float32
            assert sizes[torch.float16] < 0.6 * sizes[None]
    finally:
        model.load_state_dict(original)


def test_folders_in_the_way_and_plans_of_other_models(llava, tmp_path):
    family, graph = llava
    plan, inputs = plan_of(graph, layers_off=(1,)), family.inputs()
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export(family.model, graph, plan, full, inputs)
    with pytest.raises(InputError, match="not empty"):
        export(family.model, graph, plan, full / "note", inputs)
    with pytest.raises(InputError, match="was made for"):
        export(family.model, graph, replace(plan, fingerprint="0"), tmp_path / "out", inputs)
    (tmp_path / "empty").mkdir()
    export(family.model, graph, plan, tmp_path / "empty", inputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert [path.name for path in full.iterdir()] == ["note"]


def test_a_failure_leaves_nothing_behind(llava, tmp_path, monkeypatch):
    family, graph = llava

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("planner.models.export.planned_export.save_torch_state_dict", fail)
    with pytest.raises(InputError, match="No space left"):
        export(family.model, graph, plan_of(graph, **MIXED), tmp_path / "out", family.inputs())
    assert not list(tmp_path.iterdir())


def test_broken_exports_are_refused(llava, tmp_path):
    family, graph = llava
    folder = tmp_path / "out"
    export(family.model, graph, plan_of(graph, **MIXED), folder, family.inputs())
    with pytest.raises(InputError, match="no model"):
        load(tmp_path)
    # Its config is of the base model, so commands would take it for that.
    with pytest.raises(InputError, match=r"only planner.models.export.load can load"):
        find_model(str(folder))
    record = (folder / "planner.json").read_text()
    (folder / "planner.json").write_text(record[: len(record) // 2])
    with pytest.raises(InputError, match="broken"):
        load(folder)
    (folder / "planner.json").write_text(record)
    (folder / "planner.safetensors").unlink()
    with pytest.raises(InputError, match="lacks"):
        load(folder)


def test_processor_files_come_along_and_weights_do_not(llava, tmp_path):
    family, graph = llava
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors",
                 "model.safetensors.index.json"):  # fmt: skip
        (source / name).write_text("from the source")
    plan = plan_of(graph, **MIXED)
    export(family.model, graph, plan, tmp_path / "out", family.inputs(), companions=source)
    texts = {
        path.name
        for path in (tmp_path / "out").iterdir()
        if path.suffix != ".safetensors" and path.read_text() == "from the source"
    }
    assert texts == {"tokenizer.json", "chat_template.jinja"}
    assert isinstance(load(tmp_path / "out").config, LlavaConfig)
