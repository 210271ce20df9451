"""Labels - a target plan per sample and budget - and their audit against the proven optimum.

Enters: a file of labels, written by `planner.training.labelling` or read back here, and the Graph
of the model that they are for. Leaves: what is wrong with them, label by label and in sum. Imports
no torch.

    label_file  the file: what was measured, what was decided, and under which terms
    heuristic   what measured utilities are taken for, and the fast way to decide
    verdicts    every label against the optimum of its own problem
    crosscheck  the same optimum from a plain CP-SAT model
    surrogate   how far the utilities themselves are from the true loss of plans
    report      all of it summed up
    audit_page  as a page to look at
"""

from planner.audit.heuristic import decide, worth
from planner.audit.label_file import Labels, Terms, read_labels, require_arrow, write_labels
from planner.audit.report import audit
from planner.audit.verdicts import Verdict, judge

__all__ = [
    "Labels",
    "Terms",
    "Verdict",
    "audit",
    "decide",
    "judge",
    "read_labels",
    "require_arrow",
    "worth",
    "write_labels",
]
