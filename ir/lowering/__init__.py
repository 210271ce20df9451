"""Lowering: from a model, or just its config, to a Graph.

In the order of the data:

    whole_model      builds a model without weights, and joins its parts once they are lowered
    attempts         candidates tried in turn, and what to say where none works
    decoder          the decoder and the output embedding;  vision_side: encoder and projector
    example_inputs   shapes to capture a part with
    capture          a part as an ATen graph, layers that are alike traced once
    tensor_writes    rewrite: writes into an empty tensor become a concatenation
    eager_attention  rewrite: softmax between two products becomes one fused attention
    aten             what the ATen operations are, by name
    flow             which nodes carry activations
    grouping         nodes that together are one operator
    describing       an operator's kind, shape and attributes
    raising          ATen nodes -> operators and sites;  folding: copies for layers that are alike
    lanes            features followed through views;  traced_layer: one layer's nodes and labels
    assignment       which features belong to which lane of a site
    head_lanes       lanes of attention heads;  neuron_lanes: of an MLP;  sites: both, of a layer
    sharing          sites that are none, since others depend on what lies inside
"""

from planner.ir.lowering.attempts import NotLowered
from planner.ir.lowering.whole_model import Lowered, lower_config, lower_model

__all__ = ["Lowered", "NotLowered", "lower_config", "lower_model"]
