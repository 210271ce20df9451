import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from planner.ir.lowering.aten import opname
from planner.ir.lowering.rewrites import fuse_attention, join_writes

HEADS, WIDTH = 3, 8


class Attention(nn.Module):
    """Eager attention over `HEADS` heads of `WIDTH` features; subclasses change the scores."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, HEADS * WIDTH) for _ in "qkv")

    def heads(self, x):
        return x.view(1, -1, HEADS, WIDTH).transpose(1, 2)

    def scores(self, query, key):
        return query @ key.transpose(2, 3) * WIDTH**-0.5

    def forward(self, x):
        query, key, value = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        weights = functional.softmax(self.scores(query, key), dim=-1)
        weights = functional.dropout(weights, 0.0, self.training)
        return (weights @ value).transpose(1, 2).flatten(2)


class PermutedKeys(Attention):
    def scores(self, query, key):
        return query @ key.permute(0, 1, 3, 2) / WIDTH**0.5


class RelativeLogits(Attention):
    """A second product is added to the scores: no fused attention computes that."""

    def scores(self, query, key):
        return super().scores(query, key) + query @ query.transpose(2, 3)


class PositionsInScores(Attention):
    """What is added to the scores does not come from activations: a mask or a bias."""

    def scores(self, query, key):
        return super().scores(query, key) + torch.zeros_like(key[..., :1].transpose(2, 3))


class SharedHeads(Attention):
    """All heads read one key: the samples and heads of the operands differ."""

    def scores(self, query, key):
        return query @ key[:, :1].transpose(2, 3) * WIDTH**-0.5


class WrittenKeys(Attention):
    """Keys are written part by part into an empty tensor."""

    cut, first = 3, 0

    def scores(self, query, key):
        whole = key.new_empty(key.shape)
        whole[..., self.cut :].copy_(key[..., self.cut :])
        whole[..., self.first : self.cut].copy_(key[..., self.first : self.cut])
        return super().scores(query, whole)


def rewritten(module, *rewrites):
    """(names of the graph's operations after rewriting, its value, the module's value)."""
    torch.manual_seed(0)
    module = module.eval()
    x = torch.randn(1, 5, 12)
    program = torch.export.export(module, (x,))
    inputs = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    for rewrite in rewrites:
        rewrite(program.graph, inputs)
    program.graph.lint()
    weights = dict(module.named_parameters())
    named = program.graph_signature.inputs_to_parameters
    values = [weights[named[name]] if name in named else x for name in inputs]
    with torch.no_grad():
        graph_module = fx.GraphModule(module, program.graph)
        (result,) = fx.Interpreter(graph_module).run(*values)
        expected = module(x)
    live = set()
    for node in reversed(list(program.graph.nodes)):
        if node.op == "output" or node in live:
            live |= {node, *node.all_input_nodes}
    return [opname(n) for n in program.graph.nodes if n in live], result, expected


@pytest.mark.parametrize("kind", [Attention, PermutedKeys])
def test_eager_attention_becomes_one_operation(kind):
    names, result, expected = rewritten(kind(), fuse_attention)
    assert names.count("scaled_dot_product_attention") == 1
    assert not {"softmax", "matmul"} & set(names)
    torch.testing.assert_close(result, expected)


def test_scores_of_two_products_stay_as_they_are():
    names, result, expected = rewritten(RelativeLogits(), fuse_attention)
    assert names.count("matmul") == 3
    torch.testing.assert_close(result, expected)


def test_masks_are_no_hindrance():
    names, result, expected = rewritten(PositionsInScores(), fuse_attention)
    assert names.count("scaled_dot_product_attention") == 1
    torch.testing.assert_close(result, expected)


def test_operands_with_other_heads_stay_as_they_are():
    names, _, _ = rewritten(SharedHeads(), fuse_attention)
    assert "scaled_dot_product_attention" not in names


def joined(graph, _):
    join_writes(graph)


def test_parts_that_are_written_become_a_concatenation():
    names, result, expected = rewritten(WrittenKeys(), joined, fuse_attention)
    assert names.count("cat") == 1
    assert "new_empty" not in names
    assert "scaled_dot_product_attention" in names
    torch.testing.assert_close(result, expected)


def test_a_tensor_that_is_not_written_whole_stays_as_it_is():
    module = WrittenKeys()
    module.first = 1
    names, _, _ = rewritten(module, joined)
    assert "cat" not in names
    assert "new_empty" in names
