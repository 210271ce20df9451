"""Valid inputs with something wrong: mutated where their structure is, and where it is not."""

import copy
import re

from hypothesis import strategies as st

__all__ = ["HOSTILE", "mutated_bytes", "mutated_document", "mutated_text"]

# What stands in the way of programs: edges of numbers, wrong types, words that mean something else.
HOSTILE = [
    0, -1, 1, 2, 49, 50, 999, 10**9, 10**18, -(10**18), 10**400, 0.0, -0.0, 0.5, 1e308, -1e308,
    5e-324, float("nan"), float("inf"), True, False, None, "", "none", "nan", "0-999999999", "3-1",
    "0-3", "1,2", "x", "0.5 of base", "1e99999999", "\0", "é", "a" * 2000, [], {}, [[]], {"a": 1},
    [0], ["x"], {0: 1}, {"0": {}}, [None],
]  # fmt: skip
_WORDS = [
    "0", "-1", "999", "1000000000", "99999999999999999999", "nan", "inf", "query", "batch",
    "2*query", "0*query", "query.999",
    "%", "(", ")", "[", "]", "{", "}", "=", ",", ", ", ":", "\n", "  ", ";",
    "&a", "*a", "!!int x", "---\n", "null", "-", "\0", "é", "\t", "@", " narrow ", "#", "'", '"',
]  # fmt: skip
_TOKEN = re.compile(r"\d+|[A-Za-z_.]+|\s+|.", re.DOTALL)


@st.composite
def mutated_text(draw, texts):
    """One of the texts with one to four changes of its words, numbers and lines."""
    lines = draw(st.sampled_from(texts)).splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        if not lines:
            break
        how = draw(st.integers(0, 5))
        first = draw(st.integers(0, len(lines) - 1))
        if how <= 2:
            tokens = _TOKEN.findall(lines[first])
            at = draw(st.integers(0, len(tokens) - 1))
            word = draw(st.sampled_from(_WORDS))
            tokens[at] = {0: word, 1: tokens[at] + word, 2: ""}[how]
            lines[first : first + 1] = "".join(tokens).splitlines(keepends=True)
            continue
        other = draw(st.integers(0, len(lines) - 1))
        if how == 3:
            lines[first], lines[other] = lines[other], lines[first]
        elif how == 4:
            lines.insert(first, lines[other])
        else:
            del lines[first : first + 1 + other % 3]
    return "".join(lines)


def _places(value, path=()):
    """Paths to everything inside a document."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else [])
    )
    for key, item in items:
        yield from _places(item, (*path, key))


@st.composite
def mutated_document(draw, documents, values=HOSTILE):
    """One of the documents with one to three of its values replaced, taken away or added."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        places = [path for path in _places(document) if path]
        if not places:
            return document
        *way, key = draw(st.sampled_from(places))
        inside = document
        for step in way:
            inside = inside[step]
        value = copy.deepcopy(draw(st.sampled_from(values)))
        how = draw(st.integers(0, 3))
        if how == 0:
            del inside[key]
        elif how == 1 and isinstance(inside, dict):
            inside[draw(st.sampled_from(["x", "0", 0, -1, 999, ""]))] = value
        else:
            inside[key] = value
    return document


@st.composite
def mutated_bytes(draw, contents):
    """One of the files with one to six of its bytes changed, or cut off, or something behind it."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        how = draw(st.integers(0, 4))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if how <= 2 and data:
            data[at] = draw(
                st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1, data[at] ^ 0x80])
            )
        elif how == 3:
            del data[at:]
        else:
            data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)
