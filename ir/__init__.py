"""The operator graph: from a stock model to a Graph, its text form, passes and costs.

Enters: a model (on the meta device) or its config. Leaves: a `Graph` of immutable operators with
symbolic token counts, and the sites in it that can be narrowed. Imports nothing else of planner.
Only `lowering` imports torch and transformers, so that a cached Graph is read, rewritten and
priced without them.

    errors      what users are told
    intervals   sets of numbers as half-open ranges
    dims        symbolic sizes
    graph       operators, sites and the Graph
    kinds       what is known of each kind of operator
    graph_text  the Graph as text, and back
    verify      what every Graph must satisfy
    structure   what lowering and passes ask of a Graph, and the rewrites they share
    vision_tower  the tower and the projector, as far as patches can be dropped there
    lowering    model -> Graph
    passes      Graph -> Graph
    cost        Graph -> what it costs
"""
