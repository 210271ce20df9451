"""Checking: what planner does with an architecture, found out on a small model of it.

Enters: the name of a model type. Leaves: a row of the table in docs/architectures.md.

    architecture_table  all rows, each checked in processes of its own, kept in a file
    architecture        the model lowered, and run under a plan beside the same plan by masks
    small_config        a config of any architecture, a few layers deep, a few dozen features wide
    small_prompt        words, and an image where the model takes one
    model_types         which architectures are checked
"""

from planner.models.checking.architecture import CHECKS, Checked
from planner.models.checking.architecture_table import check_types, sites_of, summary

__all__ = ["CHECKS", "Checked", "check_types", "sites_of", "summary"]
