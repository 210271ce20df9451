"""Lowering: from a model, or just its config, to a Graph.

Enters: a transformers config, or a model with weights. Leaves: a Graph, and notes on what was left
out. From the whole to the parts:

    whole_model      build a model without weights, lower its parts, join them into a Graph
    decoder          the decoder, and the output embedding after it
    vision_side      the vision encoder and the projector
    attempts         candidates tried in turn, and what to say where none works
    example_inputs   shapes to capture a part with
    capture          a part as an ATen graph; of layers that are alike, one is traced
    rewrites         one form for each operation of that graph: linears, fused attention
    raising          the ATen graph -> operators and sites
    aten             what ATen operations are, by name
    flow             which nodes carry activations
    grouping         nodes that together are one operator
    describing       kind, shape and attributes of an operator
    recurrences      FLOPs of state-space and linear-attention layers, counted as they run
    counted_flops    a counter of FLOPs as they run
    folding          copies of a traced layer, for the layers that are like it
    sites            what can be narrowed in one traced layer: its heads, its neurons
    lanes            one traced layer: its nodes, and features followed through views
    assignment       which features of which linears belong to which lane
"""

from planner.ir.lowering.attempts import NotLowered
from planner.ir.lowering.whole_model import Lowered, lower_config, lower_model

__all__ = ["Lowered", "NotLowered", "lower_config", "lower_model"]
