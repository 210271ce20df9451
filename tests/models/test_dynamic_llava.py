"""Dynamic-LLaVA against naive twins: predictors token by token, pruning sample by sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan_of
from predictors import random_predictors, write_predictors

from planner.ir.errors import InputError
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.skipping import obeying
from planner.models.tokens.predictors import Predictors, load_predictors
from planner.models.tokens.selectors import DecoderInputs, select_tokens
from planner.plan import TokenStage
from planner.planning.selectors import DynamicLLaVA, PredictorSettings, parse

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
    weights = folder / "predictors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="are broken"):
        load_predictors(folder, 64)
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
