"""A cache that evicts, against an attention function that hides what would be gone, in loops."""

import pytest
import torch
from families import cached
from plans import plan_of
from restored import same_state, snapshot
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.models.running.kv_cache import kv_bytes
from planner.models.running.skipping import obeying, session_on
from planner.plan import TokenStage, dump_plan, load_plan
from planner.planning.compiler import plan_graph
from planner.planning.pricing import Pricing
from planner.planning.request import Request
from planner.planning.switches import AXES, SwitchSet, with_switches

HEAVY, RECENT = 0.2, 0.15
POLICY = f"h2o:heavy={HEAVY},recent={RECENT}"


def close(actual, expected, relative=1e-5):
    return (actual - expected).norm() <= relative * expected.norm()


class Hiding:
    """Attention over a whole cache in which evicted entries are hidden, one head at a time."""

    def __init__(self):
        self.layers = {}

    def __call__(self, module, query, key, value, mask, scaling, **kwargs):
        batch, heads, new, _ = query.shape
        kv_heads, keys = key.shape[1:3]
        group = heads // kv_heads
        states = self.layers.setdefault(module.layer_idx, {})
        output = torch.zeros_like(query)
        for b in range(batch):
            seen = mask[b % len(mask), 0, :, :keys] == 0
            real = seen.any(0)
            for g in range(kv_heads):
                gone, score, budget = states.get((b, g), (set(), torch.zeros(0), None))
                score = torch.cat([score, torch.zeros(keys - len(score))])
                alive = torch.tensor([place not in gone for place in range(keys)])
                for head in range(g * group, (g + 1) * group):
                    logits = query[b, head] @ key[b, g].T * scaling
                    weights = logits.masked_fill(~(seen & alive), -1e30).softmax(-1)
                    output[b, head] = weights @ value[b, g]
                    score = score + weights[real[keys - new :]].sum(0)
                left = [place for place in range(keys) if real[place] and place not in gone]
                budget = budget or (int(len(left) * HEAVY), max(1, int(len(left) * RECENT)))
                older, newest = left[: -budget[1]], left[-budget[1] :]
                best = sorted(older, key=lambda place: (-float(score[place]), place))
                gone = set(range(keys)) - {*best[: budget[0]], *newest}
                states[b, g] = (gone, score, budget)
        return output.transpose(1, 2), None


@pytest.fixture
def hiding():
    """Makes a model attend so; undone afterwards."""
    changed = []

    def use(model):
        ALL_ATTENTION_FUNCTIONS.register("hiding", Hiding())
        ALL_MASK_ATTENTION_FUNCTIONS.register("hiding", eager_mask)
        config = model.config.get_text_config(decoder=True)
        changed.append((config, config._attn_implementation))
        config._attn_implementation = "hiding"

    yield use
    for config, implementation in changed:
        config._attn_implementation = implementation


@pytest.mark.parametrize("name", ["llava", "qwen3", "phi", "paligemma"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_eviction_equals_hiding_what_is_gone(lowered_family, hiding, name, side):
    """Prompt, decoding and a second question, in a batch with padding."""
    family, graph = lowered_family(name)
    inputs = family.inputs(3, before=(9, 4, 14), after=(6, 11), padding_side=side)
    words = torch.randint(3, 100, (3, 11), generator=torch.Generator().manual_seed(1))
    turns = [words[:, n : n + 1] for n in range(6)] + [words[:, 6:10], words[:, 10:]]

    def run():
        mask, cache, logits = inputs["attention_mask"], None, []
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        output = family.model(**inputs, use_cache=True)
        logits.append(output.logits[range(3), last])
        for ids in turns:
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            cache = output.past_key_values
            output = family.model(input_ids=ids, attention_mask=mask, **cached(family.model, cache))
            logits.append(output.logits)
        return cache, logits

    with obeying(family.model, graph, plan_of(graph, kv=POLICY)):
        cache, found = run()
    _, dense = run()
    hiding(family.model)
    _, expected = run()
    assert torch.equal(found[0], dense[0]), "the prompt itself is not changed"
    for step, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert close(actual, wanted), f"step {step}"
    assert not close(found[-1], dense[-1], 1e-2)
    longest = int(inputs["attention_mask"].sum(1).max())
    kept = int(longest * HEAVY) + int(longest * RECENT)
    assert [layer.keys.shape[2] for layer in cache.layers] == [kept] * graph.layers


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {}])
def test_a_batch_of_policies_equals_one_by_one(llava, options):
    family, graph = llava
    stage = TokenStage(1, 9, 16)
    both = [
        plan_of(graph, kv=POLICY, tokens=(stage,), heads={1: (1,), 2: ()}, layers_off=(0,)),
        plan_of(graph, kv="h2o:heavy=0.5,recent=0.1", heads={3: (0,)}),
    ]
    inputs = family.inputs(2, before=(3, 6))
    session = session_on(family.model, graph)
    options = {"do_sample": False, "max_new_tokens": 12} | options
    if options["do_sample"]:
        both, inputs = both[:1], family.inputs(1)
    torch.manual_seed(3)
    with session.under(both):
        together = family.model.generate(**inputs, **options)
    for row, plan in enumerate(both):
        where = inputs["attention_mask"][row].bool()
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone |= {name: inputs[name][row, where][None] for name in ("input_ids", "attention_mask")}
        torch.manual_seed(3)
        with session.under(plan):
            expected = family.model.generate(**alone, **options)
        assert torch.equal(together[row, -12:], expected[0, -12:])


@pytest.mark.parametrize("new", [1, 5, 40])
@torch.no_grad()
def test_the_cache_holds_the_bytes_that_it_was_priced_at(llava, new):
    family, lowered_graph = llava
    graph = with_switches(lowered_graph, 7)
    inputs = family.inputs(before=(30,))
    stages = (TokenStage(2, 5, 16, "uniform"),)
    plan = plan_of(graph, layers_off=(0,), heads={1: (0,)}, tokens=stages, kv=POLICY)
    with obeying(family.model, graph, plan):
        run = family.model.generate(
            **inputs, max_new_tokens=new + 1, return_dict_in_generate=True, do_sample=False
        )
    switches = SwitchSet("all", AXES, token_layers=(2,), token_selector="uniform")
    workload = Workload(16, inputs["input_ids"].shape[1] - 16, new, 1, 16)
    pricing = Pricing(graph, workload, switches.with_kv_policy(POLICY), device("v100"))
    assert kv_bytes(run.past_key_values) == pricing.cost_of(plan)["kv"]
    assert pricing.base == Pricing(graph, workload, switches, device("v100")).base


def test_a_policy_in_a_plan_file(llava, tmp_path):
    _, graph = llava
    plan = plan_of(graph, kv=POLICY)
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(plan))
    assert load_plan(path) == plan
    assert not plan.is_dense
    assert load_plan(path).kv == POLICY


def test_what_cannot_evict_says_so(lowered_family):
    family, graph = lowered_family("llava")
    session = session_on(family.model, graph)

    def refused(match, **options):
        errors = (InputError, ValueError)
        with session.under(plan_of(graph, kv=POLICY)), pytest.raises(errors, match=match):
            family.model.generate(**family.inputs(), do_sample=False, max_new_tokens=8, **options)

    # `generate` leaves its static cache with the model.
    refused("evicted from a cache", cache_implementation="static")
    before = snapshot(family.model)
    # Newer versions of transformers ask the cache first, and refuse themselves.
    refused("be cropped", prompt_lookup_num_tokens=2)
    for text, match in (("h2o:heavy=2", "out of range"), ("snapkv", "no KV cache policy")):
        with pytest.raises(InputError, match=match):
            session.obey(plan_of(graph, kv=text))
    assert same_state(before, snapshot(family.model))
    sliding, graph = lowered_family("gemma3")
    with pytest.raises(InputError, match="sliding window"):
        session_on(sliding.model, graph).obey(plan_of(graph, kv=POLICY))

    # And a plan is not made that could not run.
    with pytest.raises(InputError, match="sliding window"):
        plan_graph(graph, Request("gemma3", 0.9, kv=POLICY, utilities="prior"))
    llava = lowered_family("llava")[1]
    blind = Request("llava", 0.9, kv="voco", tokens="fastv:k=2,r=0.5", utilities="prior")
    with pytest.raises(InputError, match="hides them"):
        plan_graph(llava, blind)
