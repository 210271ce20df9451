"""Operator kinds: one record each, read by the verifier, the costs, the text form and passes.

    record       the type of the records, `Kind`, and the register of them, `KINDS`
    products     kinds that multiply: linears, attention, convolutions, experts, recurrences
    elementwise  norms, activations, rotations, sums and other work without a product
    copies       inputs, look-ups, gathers, the choice of tokens

A new kind is one record; it is known from then on.
"""

from planner.ir.kinds import copies, elementwise, products
from planner.ir.kinds.record import KINDS, Attribute, Kind, kind_of

__all__ = ["KINDS", "Attribute", "Kind", "copies", "elementwise", "kind_of", "products"]
