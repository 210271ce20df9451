"""All kinds of operators.

In the formulas `o` is an operator and `n` gives the size of every symbol; see
`planner.ir.kinds.kind.Kind` for what each field says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from planner.ir.dims import Dim, Sizes
from planner.ir.graph import Operator
from planner.ir.kinds.kind import Attribute, Kind

_BIAS, _IN, _OUT = Attribute("bias", least=0), Attribute("in"), Attribute("out")
_FUNCTION = Attribute("function", "word")

# -- shape rules ----------------------------------------------------------------------------------

# Size at which shapes are compared: a prime, so that different expressions differ.
_SAMPLE = 1009


def _elements(operator: Operator) -> int:
    symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
    return operator.elements(dict.fromkeys(symbols, _SAMPLE))


def last_is(attribute: str) -> Callable[[Operator], str | None]:
    """The last dimension is what an attribute says."""

    def fault(o: Operator) -> str | None:
        fits = o.shape[-1] == Dim(o.integer(attribute))
        return None if fits else f"{o[attribute]} features ({attribute})"

    return fault


def lacks_features(operator: Operator, inputs: Sequence[Operator]) -> str | None:
    """A linear takes the features of its input: all, a part, or the same ones several times."""
    if len(inputs) != 1:
        return None
    columns, have = operator.integer("in"), _elements(inputs[0])
    taken = _elements(operator) // operator.integer("out") * columns
    if taken > have and taken % have:
        return f"takes {columns} features, {inputs[0].name} has fewer"
    return None


def cannot_broadcast(operator: Operator, inputs: Sequence[Operator]) -> str | None:
    """A smaller operand of equal rank in a sum or product broadcasts.

    Views are no operators, so an operand of the same size or larger may be arranged otherwise or
    read in part, and a smaller one may be arranged otherwise before it is broadcast.
    """
    for source in inputs:
        if len(source.shape) != len(operator.shape):
            continue
        *others, last = (
            have in (want, Dim(1)) for have, want in zip(source.shape, operator.shape, strict=True)
        )
        have, want = _elements(source), _elements(operator)
        features_differ = all(others) and not last
        if have < want and (features_differ or (not all(others) and want % have)):
            return f"cannot broadcast {source.name} to its shape"
    return None


# -- linears --------------------------------------------------------------------------------------

_LINEAR = Kind(
    "linear",
    "x W^T (+ b); tied: its weights are another operator's as well",
    (_BIAS, _IN, _OUT, Attribute("tied", optional=True)),
    shape_fault=last_is("out"),
    input_fault=lacks_features,
    flops=lambda o, n: 2 * o.rows(n) * o.integer("in") * o.integer("out"),
    weights=lambda o: (o.integer("in") + o.integer("bias")) * o.integer("out"),
    inputs_read=lambda o, n, inputs: o.rows(n) * o.integer("in"),
    keeps_zero=lambda o: not o["bias"],
)
_FUSED_LINEAR = replace(
    _LINEAR,
    name="fused_linear",
    computes="several linears (count) of one input, run as one",
    attributes=(*_LINEAR.attributes, Attribute("count")),
)
_NORM_LINEAR = replace(
    _FUSED_LINEAR,
    name="norm_linear",
    computes="a norm folded into the (fused) linear after it",
    attributes=(*_FUSED_LINEAR.attributes, Attribute("norm_bias", least=0)),
    weights=lambda o: _LINEAR.weights(o) + o.integer("in") * (1 + o.integer("norm_bias")),
    keeps_zero=lambda o: not o["bias"] and not o["norm_bias"],
)


# -- attention ------------------------------------------------------------------------------------


def attended_keys(operator: Operator, sizes: Sizes) -> int:
    """Keys that each query of an attention meets.

    A cache with a sliding window hands over at most the window's last tokens besides the tokens
    being processed, and drops the others; a prompt that begins with an empty cache is computed
    in full, whatever the window.
    """
    dim = Dim.of(operator["keys"])
    keys = dim.evaluate(sizes)
    if operator.get("window") is None:
        return keys
    # A window is of the decoder's own tokens.
    own = keys - beside(dim, sizes)
    queries = operator.shape[-2].evaluate(sizes)
    return keys - own + queries + min(own - queries, operator.integer("window") - 1)


def beside(keys: Dim, sizes: Sizes) -> int:
    """How many of an attention's keys are of an encoder's output."""
    return sum(count * sizes[symbol] for symbol, count in keys.terms if symbol == "encoded")


def _attention_shape(operator: Operator) -> str | None:
    heads, groups = operator.integer("heads"), operator.integer("kv_heads")
    if heads % groups:
        return f"heads in {groups} equal groups, not {heads} of them"
    places = operator.shape[-3:-2]
    if not places or (places[0].is_constant and places[0] != Dim(heads)):
        return f"{heads} heads before its tokens"
    return last_is("value_dim")(operator)


def _attention_reads(operator: Operator, sizes: Sizes, inputs: Iterable[int]) -> int:
    """Queries, and the keys and values once per KV head, however many queries share them."""
    *samples, heads, queries, value_dim = (dim.evaluate(sizes) for dim in operator.shape)
    head_dim = operator.integer("head_dim")
    keys = attended_keys(operator, sizes) * operator.integer("kv_heads")
    return math.prod(samples) * (heads * queries * head_dim + keys * (head_dim + value_dim))


def _cached(operator: Operator, sizes: Sizes) -> int:
    """Keys and values of a decoder's own tokens, unless there is always the same number of them."""
    keys = Dim.of(operator["keys"])
    if operator.part != "decoder" or keys.is_constant:
        return 0
    tokens = keys.evaluate(sizes) - beside(keys, sizes)
    if operator.get("window") is not None:
        tokens = min(tokens, operator.integer("window") - 1)
    per_token = operator.integer("head_dim") + operator.integer("value_dim")
    return sizes["batch"] * tokens * operator.integer("kv_heads") * per_token


# -- other products -------------------------------------------------------------------------------


def _taps(operator: Operator) -> int:
    return operator.integer("in") * operator.integer("kernel")


def _scan_flops(operator: Operator, sizes: Sizes) -> int:
    """Products inside the recurrence; those of a chunk are shared out evenly in a decoding step."""
    symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
    # After a token stage at layer k the tokens are counted by query.k.
    (query,) = (symbol for symbol in symbols if symbol.startswith("query"))
    tokens, context = sizes[query], sizes[query.replace("query", "context")]
    chunk = operator.get("chunk", 1)
    done = math.ceil(context / chunk)
    in_chunks = operator.get("flops_per_chunk", 0) + done * operator.get("flops_per_chunk_pair", 0)
    flops = tokens * operator.integer("flops_per_row")
    if tokens < context:
        flops += math.ceil(tokens * in_chunks / chunk)
    else:
        flops += done * in_chunks + operator.get("flops", 0)
    return int(sizes["batch"] * flops)


def _keeps_too_many(operator: Operator) -> str | None:
    keep, of = operator.integer("keep"), operator.integer("of")
    return f"at most {of} tokens, not {keep}" if keep > of else None


def _tokens_scored(operator: Operator, sizes: Sizes) -> int:
    """Tokens that a stage chooses from, in all samples; 0 where all stay, as in a decoding step."""
    before = Dim.of(operator["before"]).evaluate(sizes)
    return 0 if before == operator.shape[-2].evaluate(sizes) else sizes["batch"] * before


# -- light work -----------------------------------------------------------------------------------

# Stock code computes norms, rotations and some activations (tanh-approximated GELU) in several
# steps, holding up to three values of the output's size on the way.
_STEPS = 3
_IN_ONE_STEP = frozenset(
    ["silu", "gelu", "gelu_tanh", "relu", "leaky_relu", "elu", "mish", "hardswish"]
)
SINGLE_PRECISION = 4


def _slices_read(operator: Operator, sizes: Sizes, inputs: Iterable[int]) -> int:
    """Of a wider value (a fused projection, for its gate) only a slice is read."""
    output = operator.elements(sizes)
    return sum(min(elements, output) for elements in inputs)


_light = partial(Kind, light_operations=1, inputs_read=_slices_read)
_copy = partial(Kind, inputs_read=lambda o, n, inputs: o.elements(n))

# -- all of them ----------------------------------------------------------------------------------

_RECORDS = (
    Kind("input", "tokens or pixels that enter a part", runs=lambda o, n: False),
    _LINEAR,
    _FUSED_LINEAR,
    _NORM_LINEAR,
    Kind(
        "attention",
        "softmax(q k^T) v, in full, not halved for causality; window: the cache keeps only the "
        "latest tokens; capped: scores are bounded by tanh",
        (
            Attribute("capped", optional=True),
            Attribute("head_dim"),
            Attribute("heads"),
            Attribute("keys", "tokens"),
            Attribute("kv_heads"),
            Attribute("value_dim"),
            Attribute("window", optional=True),
        ),
        shape_fault=_attention_shape,
        flops=lambda o, n: (
            2 * o.rows(n) * attended_keys(o, n) * (o.integer("head_dim") + o.integer("value_dim"))
        ),
        inputs_read=_attention_reads,
        cached=_cached,
    ),
    Kind(
        "matmul",
        "a batched product of two activations, over `inner` features",
        (Attribute("inner"),),
        flops=lambda o, n: 2 * o.elements(n) * o.integer("inner"),
    ),
    Kind(
        "conv",
        "a convolution, of `in` channels of a group by `kernel` taps",
        (_BIAS, _IN, Attribute("kernel"), _OUT),
        flops=lambda o, n: 2 * o.elements(n) * _taps(o),
        weights=lambda o: (_taps(o) + o.integer("bias")) * o.integer("out"),
    ),
    Kind(
        "experts",
        "a grouped product: each row is routed to one of the experts",
        (Attribute("experts"), _IN, _OUT),
        shape_fault=last_is("out"),
        flops=lambda o, n: 2 * o.elements(n) * o.integer("in"),
        weights=lambda o: o.integer("experts") * o.integer("in") * o.integer("out"),
        # Few rows leave most experts untouched.
        weights_read=lambda o, n: (
            min(o.integer("experts"), o.rows(n)) * o.integer("in") * o.integer("out")
        ),
        inputs_read=lambda o, n, inputs: o.rows(n) * o.integer("in"),
    ),
    Kind(
        "scan",
        "a state-space or linear-attention recurrence, and what else a layer multiplies between "
        "its projections: `flops` once, others a token, or a chunk of so many",
        (
            Attribute("chunk", optional=True),
            Attribute("flops", least=0, optional=True),
            Attribute("flops_per_chunk", least=0, optional=True),
            Attribute("flops_per_chunk_pair", least=0, optional=True),
            Attribute("flops_per_row", least=0),
        ),
        flops=_scan_flops,
    ),
    _copy(
        "select_tokens",
        "keeps the image tokens a selector chose: `keep` of `of`, where there were "
        "`before` tokens in all, scored by `score_width` query features (0: by none)",
        (
            Attribute("before", "tokens"),
            Attribute("keep", least=0),
            Attribute("of"),
            Attribute("score_width", least=0),
        ),
        shape_fault=_keeps_too_many,
        runs=lambda o, n: _tokens_scored(o, n) > 0,
        # The scores of one query.
        flops=lambda o, n: 2 * _tokens_scored(o, n) * o.integer("score_width"),
        inputs_read=lambda o, n, inputs: (
            o.elements(n) + _tokens_scored(o, n) * o.integer("score_width")
        ),
    ),
    _light(
        "norm",
        "RMSNorm, LayerNorm or GroupNorm; centred: a LayerNorm without a bias",
        (_BIAS, Attribute("centred", optional=True), Attribute("width")),
        light_operations=7,
        weights=lambda o: o.integer("width") * (1 + o.integer("bias")),
        held_bytes=lambda o, element: _STEPS * SINGLE_PRECISION,
        keeps_zero=lambda o: not o["bias"],
    ),
    _light(
        "softmax",
        "a softmax outside an attention",
        light_operations=5,
        held_bytes=lambda o, element: _STEPS * SINGLE_PRECISION,
    ),
    _light(
        "rotary",
        "rotation of queries or keys by position; lanes: only so many features turn",
        (Attribute("lanes", optional=True),),
        light_operations=3,
        held_bytes=lambda o, element: _STEPS * element,
    ),
    _light(
        "activation",
        "an elementwise non-linearity",
        (_FUNCTION,),
        light_operations=4,
        held_bytes=lambda o, element: 0 if o["function"] in _IN_ONE_STEP else _STEPS * element,
    ),
    _light("elementwise", "any other elementwise work", (_FUNCTION,)),
    _light(
        "add", "an elementwise sum, residual connections among them", input_fault=cannot_broadcast
    ),
    _light(
        "multiply",
        "an elementwise product, or a scaling",
        input_fault=cannot_broadcast,
        keeps_zero=lambda o: True,
    ),
    Kind("reduce", "sum, mean, maximum, top-k and the like", (_FUNCTION,), light_operations=1),
    _copy(
        "embedding",
        "table look-up; the rows it reads count as its input",
        (Attribute("entries"), Attribute("width")),
        shape_fault=last_is("width"),
        weights=lambda o: o.integer("entries") * o.integer("width"),
        weights_read=lambda o, n: 0,
    ),
    _copy("gather", "tokens or rows copied by index", keeps_zero=lambda o: True),
)

# Name -> record.
KINDS: dict[str, Kind] = {record.name: record for record in _RECORDS}
