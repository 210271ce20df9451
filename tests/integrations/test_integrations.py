"""Planned models in other programs answer as planner's own; harnesses are tested where they are."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers.cli.serving.model_manager import ModelManager

import planner
from planner.integrations import transformers_serve
from planner.integrations.harness_options import taken_out
from planner.ir.errors import InputError
from planner.loading import load_model
from planner.planning.catalog import tiny_llava_folder

FOLDER = str(tiny_llava_folder())
QUESTION = "how many red circles are there ?"
PICTURE = Image.new("RGB", (64, 64), (200, 30, 30))


def answer(model, processor):
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=[PICTURE], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def fraction(model):
    return planner.plan_of(model).cost["flops"]["fraction"]


def planned_answer(budget):
    model, processor, _ = load_model("tiny-llava")
    planner.compile(model, budget, processor=processor)
    return answer(model, processor)


def test_options_of_plans_are_taken_out_of_a_harness_s():
    given = {"pretrained": "x", "budget": 0.5, "device": "cpu", "batch": 3, "plan_device": "h100"}
    assert taken_out(given) == {"budget": 0.5, "device": "h100"}
    assert given == {"pretrained": "x", "device": "cpu", "batch": 3}
    assert taken_out({}) == {"budget": 1.0}


def test_transformers_server_loads_planned_models(monkeypatch):
    monkeypatch.setattr(transformers_serve.PlannedModelManager, "options", {"budget": 0.5})
    # Of a model that is not preloaded a timer would outlive the test.
    loading = {"device": "cpu", "dtype": "float32", "force_model": FOLDER}
    manager = transformers_serve.PlannedModelManager(**loading)
    model, processor = manager.load_model_and_processor(f"{FOLDER}@main")
    assert fraction(model) <= 0.5
    assert answer(model, processor) == planned_answer(0.5)
    stock, _ = ModelManager(**loading).load_model_and_processor(f"{FOLDER}@main")
    with pytest.raises(InputError, match="compile"):
        planner.plan_of(stock)


def test_transformers_server_cannot_page_the_cache_of_a_plan(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["serve", FOLDER, "--continuous-batching"])
    with pytest.raises(SystemExit) as stopped:
        transformers_serve.main()
    assert stopped.value.code == 2
    assert "leave out --continuous-batching" in capsys.readouterr().err


def test_lmms_eval_asks_a_planned_model():
    pytest.importorskip("lmms_eval")
    from planner.integrations.lmms_harness import PlannedLMM, manifest

    assert manifest().chat_class_path.endswith(PlannedLMM.__name__)
    lmm = PlannedLMM(FOLDER, budget=0.5, batch_size=2)
    assert fraction(lmm.model) <= 0.5
    content = [{"type": "image", "url": PICTURE}, {"type": "text", "text": QUESTION}]
    lmm.task_dict = {"scenes": {"test": [[{"role": "user", "content": content}]] * 3}}
    wanted = {"max_new_tokens": 4, "until": ["\n"]}
    requests = [
        SimpleNamespace(args=(QUESTION, lambda doc: doc, wanted, number, "scenes", "test"))
        for number in range(3)
    ]
    assert lmm.generate_until(requests) == [planned_answer(0.5)] * 3
    with pytest.raises(InputError, match="unknown model argument 'colour'"):
        PlannedLMM(FOLDER, colour="red")


def test_lm_eval_scores_with_a_planned_model(tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from transformers import LlamaConfig, LlamaForCausalLM

    from planner.integrations.lm_harness import PlannedLM

    torch.manual_seed(0)
    _, processor, _ = load_model("tiny-llava")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=len(processor.tokenizer), num_attention_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    requests = [
        Instance("loglikelihood", {}, (QUESTION, " " + word), 0) for word in ("three", "two red")
    ]
    found = {}
    for budget in (1.0, 0.5):
        harness = PlannedLM(
            pretrained=str(tmp_path), device="cpu", budget=budget, utilities="prior"
        )
        found[budget] = [score for score, _ in harness.loglikelihood(requests)]
        assert fraction(harness.model) <= budget
        tokens = harness._encode_pair(QUESTION, " three")
        ids = torch.tensor([tokens[0] + tokens[1]])
        with torch.no_grad():
            logits = harness.model(ids[:, :-1]).logits[0].log_softmax(-1)
        right = sum(logits[len(tokens[0]) - 1 + n, token] for n, token in enumerate(tokens[1]))
        assert found[budget][0] == pytest.approx(float(right), abs=1e-4)
    assert found[1.0] != found[0.5]
