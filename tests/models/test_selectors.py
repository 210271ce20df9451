"""What holds for every selector: its text form, its counts, and independence of the batch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predictors import random_predictors

from planner.ir.errors import InputError
from planner.models.tokens.selectors import (
    DecoderInputs,
    LayerAttention,
    TowerAttention,
    VisionInputs,
    mark_tokens,
    select_features,
    select_tokens,
)
from planner.models.tokens.selectors.scoring import pack
from planner.planning.selectors import (
    KV_POLICIES,
    SELECTORS,
    DecoderSelector,
    FastV,
    Learned,
    Needs,
    PruMergePlus,
    SparseVLM,
    VisionSelector,
    parse,
    parse_kv_policy,
    selector_of,
    stages_of,
)

DECODER = [
    "fastv:r=0.3", "fastv:r=0", "fastv:r=1", "sparsevlm:after=2,keep=5", "sparsevlm:after=2,keep=0",
    "sparsevlm:after=2,keep=9,recycle=false", "random:keep=5", "random:keep=99,seed=3",
    "uniform:keep=7", "uniform:keep=0", "learned:keep=5",
    "dart:keep=6,image_pivots=2,text_pivots=1", "dart:keep=99",
    "divprune:ratio=0.3", "divprune:ratio=1", "pyramiddrop:k=2,ratio=0.4,positions=original",
    "dynamic-llava:/predictors,k=2,ratio=0.3", "dynamic-llava:folder=/a=b,k=0,ratio=0",
    "ivtp:tower=1,decoder=0.3,k=2", "ivtp:tower=1,decoder=1,k=1/2,group=1,positions=original",
]  # fmt: skip
VISION = [
    "prumerge", "prumerge:neighbours=0", "prumerge+", "prumerge+:ratio=0.125", "prumerge+:ratio=1",
    "prumerge:max=0.1", "prumerge+:max=0.3", "prumerge+:max=0.99", "trim:max=0.05", "trim:max=0.5",
    "visionzip:dominant=6,contextual=3", "visionzip", "visionzip:dominant=1,contextual=0",
    "hired", "hired:ratio=0", "hired:ratio=1", "trim", "trim:ratio=0.25", "trim:ratio=1",
    "fastervlm:keep=5", "vispruner:keep=9", "vispruner:keep=2,important=0", "downsample:side=1",
    "hired:positions=original", "cdpruner:keep=5", "cdpruner:keep=99",
    "trim:ratio=0.5,clip=/clip",
]  # fmt: skip


def test_adaptive_rules_are_those_whose_counts_nothing_fixes():
    adaptive = {text for text in DECODER + VISION if parse(text).is_adaptive}
    assert adaptive == {
        "prumerge", "prumerge:neighbours=0", "prumerge:max=0.1", "prumerge+", "prumerge+:max=0.3",
        "prumerge+:max=0.99", "trim", "trim:max=0.05", "trim:max=0.5",
    }  # fmt: skip
    assert all(("max" in text) == (parse(text).counts(36) != (None,)) for text in adaptive)


def test_every_method_is_in_both_tables():
    assert {text.partition(":")[0] for text in DECODER + VISION} == set(SELECTORS)
    for name, kind in {**SELECTORS, **KV_POLICIES}.items():
        assert kind.name == name


@pytest.mark.parametrize("text", DECODER + VISION)
def test_text_form_round_trips(text):
    selector = parse(text)
    assert parse(str(selector)) == selector
    assert isinstance(selector, DecoderSelector if text in DECODER else VisionSelector)


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "pyramiddrop"])
def test_a_plan_runs_all_of_a_selector_named_alone(name):
    """In a plan, a name alone would keep what its stage says, in one step."""
    assert {selector_of(stage) for stage in stages_of(name, 576)} == {parse(name)}


@given(st.integers(1, 99), st.floats(0, 1))
def test_fastv_round_trips_at_any_value(k, r):
    assert parse(str(FastV(k, r))) == FastV(k, r)


def test_text_form_of_lists_flags_and_defaults():
    assert (
        str(parse("sparsevlm:keep=66/30/17,recycle=false"))
        == "sparsevlm:keep=66/30/17,recycle=false"
    )
    assert str(SparseVLM()) == "sparsevlm:after=2/6/15"
    assert parse(" fastv : k=3, r=0.75 ".replace(" :", ":")) == FastV(k=3, r=0.75)
    assert parse("prumerge+") == PruMergePlus(ratio=None)
    assert str(parse_kv_policy("h2o:heavy=0.25")) == "h2o:heavy=0.25"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastvv", "There is no token selector 'fastvv'; known: fastv, sparsevlm, "),
        ("h2o", "'h2o' is a policy of the KV cache"),
        ("fastv:keep=3", "fastv has no field 'keep'; its fields: k, r."),
        ("fastv:k=two", "fastv:k=two cannot be read: k is a whole number."),
        ("fastv:k=2.0", "fastv:k=2.0 cannot be read: k is a whole number."),
        ("fastv:r=half", "r is a number."),
        ("fastv:r=nan", "fastv:r=nan is out of range: r is a share from 0 to 1."),
        ("fastv:r=1.5", "r is a share from 0 to 1."),
        ("fastv:k=0", "k is a layer from 1 on"),
        ("fastv:2", "'fastv:2' is not of the form fastv:field=value,field=value."),
        ("fastv:k=2,", "is not of the form"),
        ("fastv:k=2,k=3", "gives k twice"),
        ("random", "random needs keep, as in random:keep=144."),
        ("random:keep=-1", "keep is a count from 0 on"),
        ("uniform:keep=4,seed=1", "uniform has no field 'seed'"),
        ("sparsevlm:keep=3/2", "keep is one count from 0 on for each of 3 layers"),
        ("sparsevlm:after=6/2/15", "after is layers from 0 on, ascending"),
        ("sparsevlm:after=2/x", "after is whole numbers such as 300/200/110"),
        ("sparsevlm:recycle=yes", "recycle is true or false"),
        ("prumerge+:ratio=0", "ratio is a share above 0, up to 1"),
        ("prumerge:ratio=0.1", "no field 'ratio'; its fields: positions, neighbours, max."),
        ("prumerge:max=1", "prumerge:max=1.0 is out of range: max is a share above 0 and below 1."),
        ("prumerge+:max=0", "max is a share above 0 and below 1"),
        ("prumerge+:max=nan", "max is a share above 0 and below 1"),
        ("prumerge+:max=0.5,ratio=0.1", "give one of the two"),
        ("trim:max=2", "max is a share above 0 and below 1"),
        ("trim:max=0.5,ratio=0.1", "give one of the two"),
        ("hired:max=0.5", "hired has no field 'max'"),
        ("visionzip:dominant=0", "dominant is a count from 1 on"),
        ("dart", "dart needs keep, as in dart:keep=144."),
        ("dart:keep=8,image_pivots=0", "image_pivots is a count from 1 on"),
        ("dart:keep=8,k=0", "k is a layer from 1 on"),
        ("divprune:ratio=2", "ratio is a share from 0 to 1"),
        ("vispruner:keep=9,important=2", "important is a share from 0 to 1"),
        ("fastervlm:keep=-1", "keep is a count from 0 on"),
        ("downsample:side=0", "side is a count from 1 on"),
        ("visionzip:positions=none", "positions is contiguous or original"),
        ("pyramiddrop:k=8/16", "ratio is one share from 1 to 0, falling, for each of 2 layers"),
        ("pyramiddrop:k=8/4/16", "k is layers from 0 on, ascending"),
        ("pyramiddrop:ratio=.5/.6/.1", "ratio is one share from 1 to 0, falling"),
        ("dynamic-llava:k=2", "needs the folder of its predictors, as in dynamic-llava:FOLDER."),
        ("hired:alpha=2", "alpha is a share from 0 to 1"),
        ("trim:ratio=-0.1", "ratio is a share from 0 to 1"),
        ("", "There is no token selector ''"),
    ],
)  # fmt: skip
def test_bad_text_says_what_is_wrong(text, message):
    with pytest.raises(InputError) as error:
        parse(text)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


def test_a_policy_is_no_selector():
    with pytest.raises(InputError, match="give it as --kv voco"):
        parse("voco")


def test_bad_kv_policy():
    with pytest.raises(
        InputError,
        match=r"There is no KV cache policy 'snapkv'; known: h2o, dynamic-llava, answer, voco\.",
    ):
        parse_kv_policy("snapkv")
    with pytest.raises(InputError, match="heavy is a share from 0 to 1"):
        parse_kv_policy("h2o:heavy=2")


def decoder_inputs(side):
    """Three prompts: two pictures, one picture, none; of lengths 40, 23 and 7; padded."""
    seq = 40
    valid, image = torch.zeros(2, 3, seq, dtype=torch.bool)
    for sample, (length, pictures) in enumerate(
        [(40, [(3, 16), (21, 9)]), (23, [(0, 16)]), (7, [])]
    ):
        start = seq - length if side == "left" else 0
        valid[sample, start : start + length] = True
        for offset, size in pictures:
            image[sample, start + offset : start + offset + size] = True
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scored = (LayerAttention(draw(3, 4, seq, 8), draw(3, 2, seq, 8), valid),) * 2
    return DecoderInputs(
        image=image, valid=valid, query=draw(3, 4, seq, 8), key=draw(3, 2, seq, 8), scored=scored,
        hidden_states=draw(3, seq, 12), normed_states=draw(3, seq, 12), image_tokens=image.sum(1),
        image_predictor=random_predictors(12).image,
    )  # fmt: skip


def alone(inputs, sample):
    """One sample without its padding."""
    tokens = inputs.valid[sample]
    return DecoderInputs(
        image=inputs.image[sample : sample + 1, tokens],
        valid=inputs.valid[sample : sample + 1, tokens],
        query=inputs.query[sample : sample + 1, :, tokens],
        key=inputs.key[sample : sample + 1, :, tokens],
        scored=tuple(
            LayerAttention(
                layer.query[sample : sample + 1, :, tokens],
                layer.key[sample : sample + 1, :, tokens],
                layer.valid[sample : sample + 1, tokens],
            )
            for layer in inputs.scored
        ),
        hidden_states=inputs.hidden_states[sample : sample + 1, tokens],
        normed_states=inputs.normed_states[sample : sample + 1, tokens],
        image_tokens=inputs.image_tokens[sample : sample + 1],
        image_predictor=inputs.image_predictor,
    )


def run(selector, inputs):
    if Needs.MARKS in selector.needs:
        marks = mark_tokens(selector, inputs.hidden_states, inputs.image, inputs.valid)
        inputs = replace(inputs, marks=marks)
    if isinstance(selector, Learned):
        inputs = replace(inputs, chosen=inputs.image.cumsum(1) <= selector.keep)
    return select_tokens(selector, inputs, selector.layers[-1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", DECODER)
def test_a_batch_gets_what_its_samples_get_alone(text, side):
    selector, inputs = parse(text), decoder_inputs(side)
    selection = run(selector, inputs)
    index, valid = pack(selection.keep & inputs.valid, side)
    states = inputs.hidden_states if selection.hidden_states is None else selection.hidden_states
    states = states.gather(1, index[..., None].expand(-1, -1, 12))
    image = inputs.image.gather(1, index) & valid
    for sample in range(3):
        one = alone(inputs, sample)
        single = run(selector, one)
        keep = single.keep[0]
        assert torch.equal(selection.keep[sample, inputs.valid[sample]], keep)
        source = one.hidden_states if single.hidden_states is None else single.hidden_states
        torch.testing.assert_close(states[sample, valid[sample]], source[0, keep])
        assert int(image[sample].sum()) == selector.counts(int(one.image.sum()))[-1]
        assert int(valid[sample].sum()) == int(keep.sum())
        positions = index[sample, valid[sample]].tolist()
        assert positions == sorted(positions), "order was lost"
    flags = valid.tolist()
    assert flags == [sorted(row, reverse=side == "right") for row in flags]


def vision_inputs(runs=3, patches=36, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tower = {
        i: TowerAttention(3 * draw(runs, 16), draw(runs, 1 + patches, 16), 4) for i in (0, -1, -2)
    }
    features = draw(runs, patches, 10)
    return VisionInputs(
        features=features, cls_feature=draw(runs, 10), tower=tower,
        patch_embeddings=draw(runs, patches, 6), text_embeddings=3 * draw(runs, 6),
        projected=features,
    )  # fmt: skip


def one_run(inputs, i):
    rows = slice(i, i + 1)
    return VisionInputs(
        features=inputs.features[rows],
        cls_feature=inputs.cls_feature[rows],
        tower={
            k: TowerAttention(t.query[rows], t.key[rows], t.heads) for k, t in inputs.tower.items()
        },
        patch_embeddings=inputs.patch_embeddings[rows],
        text_embeddings=inputs.text_embeddings[rows],
        projected=inputs.projected[rows],
    )


@pytest.mark.parametrize("patches", [1, 36, 49])
@pytest.mark.parametrize("text", VISION)
def test_a_batch_of_pictures_gets_what_they_get_alone(text, patches):
    selector, inputs = parse(text), vision_inputs(patches=patches)
    selection = select_features(selector, inputs)
    for i in range(3):
        single = select_features(selector, one_run(inputs, i))
        torch.testing.assert_close(selection.features[i], single.features[0])
        assert torch.equal(selection.indices[i], single.indices[0])
        kept = selection.indices[i][selection.indices[i] >= 0].tolist()
        assert len(set(kept)) == len(kept)
        assert all(patch < patches for patch in kept)
        assert len(selection.indices[i]) == len(selection.features[i])
        count = selector.counts(patches)[0]
        left = len(selection.features[i])
        assert count is None or left == count or ("max" in text and left < count)
        if "prumerge" not in text and "downsample" not in text:  # which change what they keep
            at = selection.indices[i] >= 0
            kept_features = inputs.features[i, selection.indices[i][at]]
            changed = kept_features != selection.features[i][at]
            assert not changed.any()


@pytest.mark.parametrize("text", VISION)
def test_half_precision_features_keep_their_type(text):
    selection = select_features(parse(text), vision_inputs(dtype=torch.bfloat16))
    assert all(f.dtype == torch.bfloat16 for f in selection.features)
    assert all(f.isfinite().all() for f in selection.features)


@pytest.mark.parametrize(
    "text", [t for t in VISION if t.split(":")[0] not in ("trim", "cdpruner", "downsample")]
)
def test_a_tower_without_cls_is_refused(text):
    inputs = replace(vision_inputs(), tower={})
    with pytest.raises(InputError, match="CLS token, which this vision tower does not have"):
        select_features(parse(text), inputs)


@pytest.mark.parametrize("text", ["trim", "cdpruner:keep=3"])
def test_no_text_encoder_is_refused(text):
    with pytest.raises(InputError, match="has no CLIP text encoder"):
        select_features(parse(text), replace(vision_inputs(), text_embeddings=None))


def test_a_forgotten_input_is_named():
    inputs = replace(decoder_inputs("left"), key=None)
    with pytest.raises(ValueError, match="did not supply key"):
        select_tokens(FastV(), inputs, 2)
