"""Dynamic-LLaVA against naive twins: predictors token by token, pruning sample by sample."""

from types import SimpleNamespace

import pytest
import torch
from families import cached
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan_of
from predictors import random_predictors, write_predictors

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.models.running.kv_cache import answers_stored, kv_bytes
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying
from planner.models.tokens.answer_cache import forget_last
from planner.models.tokens.kept_tokens import Keys
from planner.models.tokens.predictors import Predictors, load_predictors
from planner.models.tokens.selectors import DecoderInputs, select_tokens
from planner.plan import TokenStage
from planner.planning.compiler import plan_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.request import Request
from planner.planning.selectors import (
    DynamicLLaVA,
    PredictorSettings,
    Sizes,
    parse,
    parse_kv_policy,
)

WIDTH = 6
few = settings(max_examples=20, deadline=None)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def norm(x, weights, name):
    spread = ((x - x.mean()) ** 2).mean()
    centred = (x - x.mean()) / (spread + 1e-5).sqrt()
    return centred * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)


def image_logits(weights, tokens, heads=8):
    """Appendix A.4.1, one token and one head at a time."""
    features = [gelu(linear(norm(t, weights, "down_mlp.0"), weights, "down_mlp.1")) for t in tokens]
    for block in ("transformer.0", "transformer.1"):
        normed = [norm(f, weights, f"{block}.norm1") for f in features]
        qkv = [linear(f, weights, f"{block}.attn.qkv").view(3, heads, -1) for f in normed]
        for place, feature in enumerate(features):
            mixed = []
            for head in range(heads):
                query = qkv[place][0, head]
                scores = torch.stack([query @ other[1, head] for other in qkv]) / len(query) ** 0.5
                chances = scores.softmax(0)
                mixed.append(sum(c * other[2, head] for c, other in zip(chances, qkv)))
            feature = feature + linear(torch.cat(mixed), weights, f"{block}.attn.proj")
            inner = linear(norm(feature, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1")
            features[place] = feature + linear(gelu(inner), weights, f"{block}.mlp.fc2")
    half = len(weights["down_mlp.1.bias"]) // 2
    mean = sum(f[half:] for f in features) / max(len(features), 1)
    return [scored(torch.cat([f[:half], mean]), weights, (0, 2, 4)) for f in features]


def scored(x, weights, places):
    for number, place in enumerate(places):
        x = linear(gelu(x) if number else x, weights, f"output_mlp.{place}")
    return x


def output_logits(weights, token):
    x = gelu(linear(norm(token, weights, "output_mlp.0"), weights, "output_mlp.1"))
    return scored(x, weights, (3, 5, 7))


def test_predictors_have_the_published_sizes():
    with torch.device("meta"):
        predictors = Predictors(4096)
    counts = [sum(p.numel() for p in m.parameters()) for m in predictors.children()]
    assert counts == [8_572_034, 2_270_338]
    published = PredictorSettings()
    assert [published.image_parameters(4096), published.output_parameters(4096)] == counts


@torch.no_grad()
def test_untrained_small_ones_tell_tokens_apart_as_the_published_do():
    def spread(width, inner):
        torch.manual_seed(0)
        predictors = Predictors(width, PredictorSettings(inner_width=inner))
        tokens = torch.randn(2, 24, width)
        whole = torch.ones(2, 24, dtype=torch.bool)
        both = predictors.image(tokens, whole), predictors.output(tokens)
        return [float((logits[..., 0] - logits[..., 1]).std(1).mean()) for logits in both]

    for small, published in zip(spread(128, 64), spread(4096, 512), strict=True):
        assert published / 4 < small < 4 * published


@few
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_predictors_equal_loops_over_tokens(seed, lengths):
    predictors = random_predictors(WIDTH, seed)
    longest = max(*lengths, 1)
    hidden = torch.randn(len(lengths), longest, WIDTH, dtype=torch.float64)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    # What stands in padding must not matter.
    found = predictors.image(hidden.masked_fill(~valid[..., None], 1e6), valid)
    assert torch.isfinite(found).all()
    for row, length in enumerate(lengths):
        wanted = image_logits(predictors.image.state_dict(), hidden[row, :length])
        torch.testing.assert_close(list(found[row, :length]), wanted)
    for row in hidden:
        alone = [output_logits(predictors.output.state_dict(), token) for token in row]
        torch.testing.assert_close(list(predictors.output(row)), alone)


@few
@given(seed=st.integers(0, 99), ratio=st.sampled_from([0, 0.2, 0.5, 1]))
def test_image_tokens_are_kept_sample_by_sample(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    predictors = random_predictors(WIDTH, seed)
    image = torch.rand(3, 12, generator=generator) < 0.6
    hidden = torch.randn(3, 12, WIDTH, generator=generator, dtype=torch.float64)
    valid = torch.ones_like(image)
    inputs = DecoderInputs(image, valid, hidden_states=hidden, image_predictor=predictors.image)
    keep = select_tokens(DynamicLLaVA("anywhere", 2, ratio), inputs, 2).keep
    for row in range(3):
        places = image[row].nonzero().flatten().tolist()
        logits = image_logits(predictors.image.state_dict(), hidden[row, places])
        scores = [float(pair.log_softmax(0)[0]) for pair in logits]
        best = sorted(range(len(places)), key=lambda n: -scores[n])[: int(ratio * len(places))]
        wanted = {places[n] for n in best} | set((~image[row]).nonzero().flatten().tolist())
        assert set(keep[row].nonzero().flatten().tolist()) == wanted


@pytest.fixture
def folder(tmp_path):
    return write_predictors(tmp_path / "predictors", 64, sparse_layer=1, vision_keep_rate=0.4)


def test_the_folder_says_layer_and_ratio(folder, monkeypatch):
    assert parse(f"dynamic-llava:{folder}") == DynamicLLaVA(str(folder), 1, 0.4)
    monkeypatch.chdir(folder.parent)
    selector = parse("dynamic-llava:predictors,ratio=0.2")
    assert selector == DynamicLLaVA(str(folder), 1, 0.2)
    # The text form holds whatever the settings say later.
    (folder / "predictors.json").unlink()
    assert parse(str(selector)) == selector


def test_broken_folders_say_what_is_wrong(folder, tmp_path):
    for text, match in (
        ("dynamic-llava", "needs the folder"),
        (f"dynamic-llava:{tmp_path / 'none'}", "holds no predictors"),
        (f"dynamic-llava:{folder},ratio=2", "ratio is a share"),
    ):
        with pytest.raises(InputError, match=match):
            parse(text)
    with pytest.raises(InputError, match="not for a decoder 32 features wide"):
        load_predictors(folder, 32)
    # So is a plan that would need them, before any model is there.
    for known in (parse(f"dynamic-llava:{folder}"), parse_kv_policy(f"dynamic-llava:{folder}")):
        assert known.parameters(64) > 0
        with pytest.raises(InputError, match="a decoder 64 features wide, and this one has 32"):
            known.parameters(32)
    with pytest.raises(InputError, match="64 features wide"):
        parse(f"dynamic-llava:{folder}").products(1, Sizes(16, hidden=32))
    weights = folder / "predictors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="are broken"):
        load_predictors(folder, 64)
    with pytest.raises(InputError, match="are broken"):
        parse(f"dynamic-llava:{folder}").parameters(64)
    (folder / "predictors.json").write_text('{"format": 1, "vision_keep_rate": 2}')
    with pytest.raises(InputError, match="vision_keep_rate"):
        parse(f"dynamic-llava:{folder}")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_pruning_a_prompt_equals_masking_what_is_dropped(llava, folder, side):
    """In a ragged batch, under plans of layers, heads and groups, and each sample alone."""
    family, graph = llava
    inputs = family.inputs(2, before=(3, 6), images=1, padding_side=side)
    stage = TokenStage(1, 6, 16, f"dynamic-llava:{folder}")
    plan = plan_of(graph, tokens=(stage,), layers_off=(2,), heads={3: (0,)}, mlp={1: (0, 2)})
    predictor = load_predictors(folder, 64).image
    image = inputs["input_ids"] == family.model.config.image_token_id

    def gates(hidden):
        keep = ~image
        for row, states in enumerate(hidden):
            places = image[row].nonzero().flatten()
            scores = torch.stack(image_logits(predictor.state_dict(), states[places]))
            best = scores.log_softmax(-1)[:, 0].sort(descending=True, stable=True).indices
            keep[row, places[best[:6]]] = True
        return keep.float()

    with obeying(family.model, graph, plan):
        found = family.model(**inputs).logits
        alone = [
            family.model(
                input_ids=inputs["input_ids"][row, where][None],
                pixel_values=inputs["pixel_values"][row : row + 1],
            ).logits[0]
            for row, where in enumerate(inputs["attention_mask"].bool())
        ]
    with MaskedExecutor(family.model, graph).using(Gates.of([plan] * 2, graph, {1: gates})):
        masked = family.model(**inputs).logits
    for row, where in enumerate(inputs["attention_mask"].bool()):
        text = where & ~image[row]
        torch.testing.assert_close(found[row, text], masked[row, text], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[row, where], alone[row], rtol=1e-4, atol=1e-4)


def greedy(model, inputs, steps, **options):
    """(ids of the answer, logits of every step, the run) of greedy decoding."""
    run = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return run.sequences[:, -steps:], torch.stack(run.logits, 1), run


def answer_gates(folder, inputs, answer):
    """Gates of a prompt and its answer as keys, by the output predictor, token by token."""
    prompt = inputs["input_ids"].shape[1]
    weights = load_predictors(folder, 64).output.state_dict()

    def gates(hidden):
        keep = torch.ones(hidden.shape[:2])
        for row, states in enumerate(hidden):
            for place in range(prompt, prompt + answer.shape[1]):
                first, second = output_logits(weights, states[place])
                keep[row, place] = float(first > second)
        return keep

    return gates


@pytest.mark.parametrize("switches", ["", "layers, heads and groups", "image tokens"])
@torch.no_grad()
def test_decoding_equals_masking_what_is_not_stored(llava, folder, switches):
    """Ragged, with a cache and without one; the KV bytes are those of what is worth keeping."""
    family, graph = llava
    inputs = family.inputs(2, before=(3, 6))
    stages = (TokenStage(1, 6, 16, "uniform:keep=6,k=1"),) if switches == "image tokens" else ()
    parts = {"layers_off": (1,), "heads": {2: (0,), 3: ()}, "mlp": {2: (0, 2)}}
    parts = parts if switches.startswith("layers") else {}
    plan = plan_of(graph, kv=f"dynamic-llava:{folder}", tokens=stages, **parts)
    with obeying(family.model, graph, plan):
        answer, logits, run = greedy(family.model, inputs, 9)
        again, without, _ = greedy(family.model, inputs, 9, use_cache=False)
        beams = [
            family.model.generate(
                **inputs, num_beams=2, max_new_tokens=6, do_sample=False, use_cache=use
            )
            for use in (True, False)
        ]
    assert torch.equal(answer, again)
    torch.testing.assert_close(logits, without, rtol=1e-4, atol=1e-4)
    assert torch.equal(*beams)
    if switches == "image tokens":
        return
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], answer], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1),
        "pixel_values": inputs["pixel_values"],
    }
    gates = answer_gates(folder, inputs, answer)
    seen = []

    def watched(hidden):
        seen.append(gates(hidden))
        return seen[-1]

    with MaskedExecutor(family.model, graph).using(Gates.of([plan] * 2, graph, {1: watched})):
        masked = family.model(**whole).logits[:, -10:-1]
    torch.testing.assert_close(logits, masked, rtol=1e-4, atol=1e-4)
    stored = seen[0][:, inputs["input_ids"].shape[1] : -1].sum(1)
    assert 0 < stored.min() < 8, "all or nothing was stored"
    lengths = [
        layer.keys.shape[-2] for layer in run.past_key_values.layers if layer.keys is not None
    ]
    prompt = inputs["input_ids"].shape[1]
    behind = [prompt + int(stored.max())] * (len(lengths) - 1)
    assert lengths == [prompt + 8, *behind]


@few
@given(
    seed=st.integers(0, 99),
    first=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    flags=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=8),
)
def test_what_is_forgotten_leaves_room(seed, first, flags):
    rows, longest = len(first), max(first)
    padded = torch.arange(longest).expand(rows, -1)
    positions = padded.masked_fill(padded >= torch.tensor(first)[:, None], -1)
    entries = positions[:, None, :, None].float()
    store = SimpleNamespace(keys=entries, values=-entries)
    keys = Keys(positions, bool((positions < 0).any()))
    wanted = [set(range(n)) for n in first]
    for step, some in enumerate(flags):
        new, stored = longest + step, torch.tensor(some[:rows])
        row = torch.full((rows, 1), new)
        keys = Keys(torch.cat([keys.positions, row], 1), keys.padded)
        store.keys = torch.cat([store.keys, row[:, None, :, None].float()], 2)
        store.values = torch.cat([store.values, -row[:, None, :, None].float()], 2)
        keys = forget_last(store, keys, stored)
        for sample, keep in enumerate(stored.tolist()):
            wanted[sample] |= {new} if keep else set()
    assert store.keys.shape[2] == keys.positions.shape[1] == max(map(len, wanted))
    for sample, places in enumerate(wanted):
        real = keys.positions[sample] >= 0
        assert keys.padded or real.all()
        assert set(keys.positions[sample, real].tolist()) == places
        assert store.keys[sample, 0, real, 0].tolist() == keys.positions[sample, real].tolist()
        assert store.values[sample, 0, real, 0].tolist() == (-keys.positions[sample, real]).tolist()


@torch.no_grad()
def test_turns_after_the_first_are_stored_whole_and_no_more_than_the_cap(llava, folder):
    family, graph = llava
    inputs = family.inputs(1)
    policy = parse_kv_policy(f"dynamic-llava:{folder},max=0.25")
    with obeying(family.model, graph, plan_of(graph, kv=str(policy))):
        answer, _, run = greedy(family.model, inputs, 9)
        cache, prompt = run.past_key_values, inputs["input_ids"].shape[1]
        stored = cache.layers[1].keys.shape[-2] - prompt
        assert stored <= 2
        turn = torch.randint(3, 90, (1, 5))
        mask = torch.ones(1, prompt + 8 + 5)
        family.model(input_ids=turn, attention_mask=mask, **cached(family.model, cache))
        assert cache.layers[1].keys.shape[-2] == prompt + stored + 5
        again, _, _ = greedy(family.model, inputs, 9, use_cache=False)
    assert torch.equal(answer, again)


@torch.no_grad()
def test_a_batch_of_plans_decodes_as_each_alone(llava, folder):
    family, graph = llava
    inputs = family.inputs(2)
    both = [
        plan_of(graph, kv=f"dynamic-llava:{folder}", layers_off=(2,)),
        plan_of(graph, kv=f"dynamic-llava:{folder},k=2", heads={1: (0,)}),
    ]
    with obeying(family.model, graph, both):
        together, _, _ = greedy(family.model, inputs, 8)
        without, _, _ = greedy(family.model, inputs, 8, use_cache=False)
    for row, plan in enumerate(both):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        with obeying(family.model, graph, plan):
            assert torch.equal(together[row], greedy(family.model, alone, 8)[0][0])
    assert torch.equal(together, without)


@pytest.mark.parametrize("most", [1.0, 0.5])
@torch.no_grad()
def test_the_cache_holds_no_more_than_it_was_priced_at(llava, folder, most):
    family, graph = llava
    inputs = family.inputs(before=(30,))
    text = {"tokens": f"dynamic-llava:{folder}", "kv": f"dynamic-llava:{folder},max={most}"}
    words = inputs["input_ids"].shape[1] - 16
    request = Request("llava", 0.9, image_tokens=16, text_tokens=words, new_tokens=12, **text)
    plan = plan_graph(graph, request).plan
    with obeying(family.model, graph, plan):
        cache = greedy(family.model, inputs, 13)[2].past_key_values
    (stored,) = answers_stored(cache)
    assert stored <= 12 * most
    load = Workload.default(graph, 16, words, 12)
    ran = PlanCosts(graph, load).of(plan, answers=stored)
    assert kv_bytes(cache) == ran["kv"]["plan"] <= plan.cost["kv"]["plan"]


@pytest.mark.parametrize("name", ["qwen3", "phi", "paligemma"])
@torch.no_grad()
def test_answers_of_other_families_are_the_same_without_a_cache(lowered_family, tmp_path, name):
    family, graph = lowered_family(name)
    write_predictors(tmp_path, int(graph.properties["hidden_size"]), sparse_layer=1)
    inputs = family.inputs(2, before=(3, 6))
    with obeying(family.model, graph, plan_of(graph, kv=f"dynamic-llava:{tmp_path}")):
        answer, logits, run = greedy(family.model, inputs, 7)
        again, without, _ = greedy(family.model, inputs, 7, use_cache=False)
    assert torch.equal(answer, again)
    torch.testing.assert_close(logits, without, rtol=1e-4, atol=1e-4)
    stored = answers_stored(run.past_key_values)
    prompt = inputs["input_ids"].shape[1]
    assert run.past_key_values.layers[1].keys.shape[-2] == prompt + max(stored)


def test_a_policy_that_governs_no_layer_is_refused(llava, folder):
    family, graph = llava
    text = f"dynamic-llava:{folder},k=4"
    with pytest.raises(InputError, match="begins at decoder layer 4"):
        plan_graph(graph, Request("llava", 0.9, kv=text))
    with (
        pytest.raises(InputError, match="begins at decoder layer 4"),
        obeying(family.model, graph, plan_of(graph, kv=text)),
    ):
        pass
