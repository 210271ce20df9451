"""The operator graph: from a stock model to a Graph, its text form, passes and costs.

Enters: a model (on the meta device) or its config. Leaves: a `Graph` of immutable operators with
symbolic token counts, and the sites in it that can be narrowed. Imports nothing else of planner.
torch and transformers are imported by `capture` and `raising` alone, so a cached Graph is read,
priced and rewritten without them.
"""
