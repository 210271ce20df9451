"""Trains a planned model by DistributedDataParallel in two processes, and compares the gradients.

python tests/models/two_processes.py FOLDER
"""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import FAMILIES
from plans import plan_of

import planner
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model

IDS = torch.arange(3, 25).view(2, 11)


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(rank, model, plan, folder):
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    planned = planner.compile(copy.deepcopy(model), plan=plan)
    first, second = (gradients(copy.deepcopy(planned), ids[None]) for ids in IDS)
    after = DistributedDataParallel(planned, find_unused_parameters=True)
    before = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    planner.compile(before, plan=plan)
    for parallel in (after, before):
        for _ in range(2):
            found = gradients(parallel, IDS[rank : rank + 1])
            assert found.keys() >= {f"module.{name}" for name in first}
            for name, gradient in first.items():
                mean = (gradient + second[name]) / 2
                torch.testing.assert_close(found[f"module.{name}"], mean, rtol=1e-4, atol=1e-5)
    waiting = DistributedDataParallel(planned)
    with torch.no_grad():
        waiting(input_ids=IDS)
    with pytest.raises(InputError, match="find_unused_parameters=True"):
        waiting(input_ids=IDS)
    # None is waited for where what the plan leaves out does not learn.
    planned.model.layers[0].requires_grad_(False)
    gradients(DistributedDataParallel(planned), IDS)
    destroy_process_group()
    # Taking apart what DistributedDataParallel holds now and then waits for the group's threads.
    os._exit(0)


if __name__ == "__main__":
    model = FAMILIES["qwen3"]().model
    graph = lower_model(model, "qwen3")
    plan = plan_of(graph, layers_off=(0,), heads={1: (1,)}, mlp={1: (0, 3, 5), 2: (2, 6)})
    start_processes(train, (model, plan, sys.argv[1]), 2, start_method="fork")
