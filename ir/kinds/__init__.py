"""Operator kinds: one record each, read by the text form, the verifier, the costs and the passes.

A new kind is one record in the table.

    table  all records, with the rules for shapes
    kind   the type of a record
"""

from planner.ir.graph import Operator
from planner.ir.kinds.kind import Attribute, Kind
from planner.ir.kinds.table import KINDS, attended_keys

__all__ = ["KINDS", "Attribute", "Kind", "attended_keys", "kind_of"]


def kind_of(operator: Operator) -> Kind:
    """The record of an operator's kind, which must be a known one."""
    return KINDS[operator.kind]
