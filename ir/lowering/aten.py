"""What the ATen operations of a captured graph are, by name: the one table that raising reads."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx


def opname(node: fx.Node) -> str:
    """Base name of the operation a node calls: ``linear``, ``mul``, ``mark`` (no overload)."""
    name = getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0].lstrip("_")


def upstream(end: fx.Node, passes: Callable[[fx.Node], bool]) -> dict[fx.Node, None]:
    """A node and all that it is computed from, as far as nodes that do not let pass, included."""
    met, pending = {end: None}, [end]
    while pending:
        node = pending.pop()
        if passes(node):
            fresh = [n for n in node.all_input_nodes if n not in met]
            met |= dict.fromkeys(fresh)
            pending += fresh
    return met


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The same elements in another arrangement, or a copy that a compiler removes. Index arrays follow
# them exactly (planner.ir.lowering.lanes).
VIEWS = _words("""
    view reshape unsafe_view transpose permute unsqueeze squeeze slice select split chunk expand
    t contiguous clone alias detach getitem unbind flatten unflatten split_with_sizes narrow
    movedim to to_copy dropout native_dropout type_as lift_fresh_copy expand_as view_as swapaxes
    repeat_interleave mT numpy_T float half bfloat16 moveaxis tensor_split chunk_cat
    view_as_complex view_as_real
""")
# Fused attention.
ATTENTION = _words("scaled_dot_product_attention")
# Products that FlopCounterMode counts.
HEAVY = ATTENTION | _words("""
    linear addmm mm bmm matmul baddbmm einsum convolution conv1d conv2d conv3d conv_transpose2d
    grouped_mm grouped_mm_fallback grouped_mm_tensor_core
""")
NORMS = _words("layer_norm native_layer_norm rms_norm group_norm fused_rms_norm")
ACTIVATIONS = _words("""
    silu gelu relu sigmoid tanh softplus leaky_relu elu hardswish mish relu_ silu_ erf exp pow
    square quick_gelu glu selu
""")
REDUCTIONS = _words("""
    mean sum amax amin max min var std var_mean norm linalg_vector_norm cumsum cumprod topk
    argmax argmin sort logsumexp any all prod argsort
""")
