"""Whatever runs in front of a decoder, or is attended to beside it, is in the price of a plan."""

import copy
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MllamaForConditionalGeneration

import planner
from planner.api import graph_of
from planner.ir.lowering import lower_model
from planner.ir.lowering.counted_flops import CountedFlops
from planner.models.checking.architecture import randomised
from planner.models.checking.small_config import small_default
from planner.models.checking.small_prompt import prompts_of
from planner.models.running.encoders import Encoders, Entered
from planner.plan import Plan
from planner.solver import Infeasible

# A text encoder with pictures; a picture encoder; tiles that some layers attend to; encoders in the
# decoder, whose rows join the words (git) or are attended to by blocks between layers (idefics); an
# output embedding with more of the model before it (blip).
BESIDE = ["udop", "vision-encoder-decoder", "mllama", "git", "idefics", "blip"]


def built(model_type):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = small_default(model_type)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    torch.manual_seed(0)
    return randomised(auto.from_config(config).float().eval())


def counted(model, inputs):
    with torch.no_grad(), CountedFlops() as counter:
        model(**inputs)
    return counter.total


@pytest.mark.parametrize("name", BESIDE)
def test_a_budget_counts_what_is_attended_to_beside_the_prompt(name):
    model = built(name)
    prompts = prompts_of(model)
    last = {"logits_to_keep": 1} if "logits_to_keep" in prompts.accepted else {}
    every = [prompts.of(n) | logits for n, logits in itertools.product((7, 40), ({}, last))]
    bases = [counted(model, inputs) for inputs in every]
    planner.compile(model, 1.0, utilities="prior", new_tokens=1)
    for inputs, base in zip(every, bases, strict=True):
        with planner.budget(model, 0.999):
            cost = planner.cost_of(model, inputs)["flops"]
            assert cost["base"] == base
            assert counted(model, inputs) == cost["plan"] <= 0.999 * base


def test_a_budget_that_an_encoder_alone_exceeds_is_refused():
    model = built("vision-encoder-decoder")
    prompts = prompts_of(model)
    planner.compile(model, 1.0, utilities="prior", text_tokens=400)
    with planner.budget(model, 0.7):
        model(**prompts.of(100))
        with pytest.raises(Infeasible, match="cannot be met"):
            model(**prompts.of(5))


def test_products_of_experts_are_counted():
    model = built("mixtral")
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    grouped = counted(model, inputs)
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.set_attn_implementation("eager")
        model(**inputs)
    assert grouped == counter.get_total_flops()


class _Outer(nn.Module):
    """A decoder that calls an encoder of pictures itself, and adds to what it is given."""

    def __init__(self):
        super().__init__()
        self.eye, self.unused = nn.Linear(4, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, inputs_embeds, pixels=None):
        inputs_embeds += 1
        if pixels is not None:
            inputs_embeds = torch.cat([self.eye(pixels), inputs_embeds], 1)
        return self.layers[0](inputs_embeds)

    def get_output_embeddings(self):
        return None


def test_encoders_inside_a_decoder_are_run_ahead_once_for_every_size():
    decoder = _Outer()
    encoders = Encoders([decoder])
    encoders.watch({"layers"})
    first, calls = decoder.layers[0], []
    decoder.eye.register_forward_hook(lambda *_: calls.append(1))
    for pictures, runs in ((3, 1), (3, 1), (5, 2)):
        given = {"inputs_embeds": torch.zeros(2, 7, 8), "pixels": torch.ones(2, pictures, 4)}
        entered = encoders.entering(given, first)
        assert entered == Entered(2 * 2 * pictures * 4 * 8, 7 + pictures, 2 * pictures)
        assert len(calls) == runs
        assert not given["inputs_embeds"].any()
    assert encoders.entering({"inputs_embeds": torch.zeros(2, 7, 8)}, first) is None
    decoder(**given)
    assert encoders.take_spent() == 0  # of no prompt to come


class _Pair(nn.Module):
    """An encoder beside a decoder, and an output embedding that is no encoder."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4)])
        self.decoder = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def get_output_embeddings(self):
        return self.head


@pytest.fixture
def pair():
    model = _Pair()
    encoders = Encoders([model, model.decoder])
    encoders.watch(())
    return model, encoders


def test_encoders_are_counted_the_first_time_and_known_from_then_on(pair):
    model, encoders = pair
    for _ in range(2):
        model.towers[1](model.towers[0](torch.ones(3, 4)))
        model.head(model.decoder(torch.ones(3, 4)))
        assert encoders.take_spent() == 2 * 2 * 3 * 4 * 8
        assert encoders.take_spent() == 0
    encoders.close()
    model.towers[0](torch.ones(3, 4))
    assert encoders.take_spent() == 0


def test_an_encoder_that_fails_or_is_cut_short_leaves_nothing_behind(pair, monkeypatch):
    model, encoders = pair

    def stop(*args):
        raise error

    for error in (ValueError(), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(model.towers[0], "forward", stop)
            with pytest.raises(type(error)):
                model.towers[0](torch.ones(3, 4))
        assert encoders.take_spent() == 0
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    model.towers[0](torch.ones(3, 4))
    assert encoders.take_spent() == 2 * 3 * 4 * 8


def test_threads_and_copies_count_for_themselves(pair):
    model, encoders = pair
    model.towers[0](torch.ones(3, 4))
    found = []
    thread = threading.Thread(target=lambda: found.append(encoders.take_spent()))
    thread.start()
    thread.join()
    other, others = copy.deepcopy((model, encoders))
    other.towers[0](torch.ones(5, 4))
    assert found == [0]
    assert others.take_spent() == 2 * 5 * 4 * 8
    assert encoders.take_spent() == 2 * 3 * 4 * 8


def test_layers_that_attend_to_pictures_beside_can_still_lose_heads():
    graph = lower_model(built("vision-encoder-decoder"))
    assert sum(1 for _ in graph.sites_of("heads")) == graph.layers
    keys = {str(o["keys"]) for o in graph if o.kind == "attention" and o.part == "decoder"}
    assert keys == {"context", "encoded"}


def test_tiles_that_masks_hide_are_priced_as_read_and_answers_go_on_from_a_cache():
    """With a mask, as processors give it, Mllama reads all tiles, however few or many the words."""
    config = small_default("mllama")
    config.text_config.num_hidden_layers = 6
    config.text_config.cross_attention_layers = [1, 4]
    config.vision_config.image_size = 28
    torch.manual_seed(0)
    model = randomised(MllamaForConditionalGeneration(config).eval())
    prompts = prompts_of(model)
    assert "cross_attention_mask" in prompts.of(7)
    every = [prompts.of(7), prompts.of(90)]
    bases = [counted(model, inputs) for inputs in every]
    planner.compile(model, 1.0, utilities="prior", new_tokens=1)
    graph = graph_of(model)
    for inputs, base in zip(every, bases, strict=True):
        with planner.budget(model, 0.97):
            cost = planner.cost_of(model, inputs)["flops"]
            assert cost["base"] == base
            assert counted(model, inputs) == cost["plan"] <= 0.97 * base
    # Layer 2 of two KV groups; cross-attention in part, and not at all beside its MLP.
    for heads in ({2: (0,)}, {1: (1,), 4: ()}, {1: (), 4: ()}):
        planner.restore(model)
        planner.compile(model, plan=Plan.of(graph, heads=heads))
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        cached, again = (
            torch.stack(model.generate(**every[0], **options, use_cache=use).logits)
            for use in (True, False)
        )
        torch.testing.assert_close(cached, again, atol=1e-5, rtol=1e-5)
