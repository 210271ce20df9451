"""Schedulers: networks that turn an input and a budget into a plan, while the prompt is read.

Enters: a stock model, its Graph, and a `Scheduler` (trained by `planner.training`). Leaves: the
model obeying, sample by sample, the plans that the scheduler makes.

    budget_features    a budget as numbers that a network reads
    insertion          the latency token in a prompt and its output out of it, unseen by the model
    layouts            which switches the logits stand for, and the plans that logits make of them
    cost_layout        the layout that budgets in cost, over layers, heads and MLP groups
    unified_layout     the one that budgets image tokens besides
    vision_controller  the network that scores image tokens and how many to keep
    token_choice       what is kept by these scores
    scheduler          the network with AdaLLaVA's latency encoder, and its folder on disk
    scheduled_model    a model running under it
    schedule_compiler  from a scheduler's folder and a budget to a Schedule
    deciding           a model with its scheduler, or without one, as users name them
"""

from planner.models.scheduling.cost_layout import CostSwitches
from planner.models.scheduling.deciding import Deciding, load_deciding
from planner.models.scheduling.layouts import LayerSwitches, Layout, Taken, UnitSwitches
from planner.models.scheduling.schedule_compiler import compile_schedule, load_scheduled
from planner.models.scheduling.scheduled_model import Scheduled
from planner.models.scheduling.scheduler import Scheduler, layout_of, load_scheduler, save_scheduler
from planner.models.scheduling.unified_layout import UnifiedSwitches

__all__ = [
    "CostSwitches",
    "Deciding",
    "LayerSwitches",
    "Layout",
    "Scheduled",
    "Scheduler",
    "Taken",
    "UnifiedSwitches",
    "UnitSwitches",
    "compile_schedule",
    "layout_of",
    "load_deciding",
    "load_scheduled",
    "load_scheduler",
    "save_scheduler",
]
