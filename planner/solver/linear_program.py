"""The linear program of a branch, for its dual values; GLOP solves it.

Layers are on in part, a site's counts share what its layer is on, and whether both units of a pair
are off is a variable of its own, held by the rows that the objective would break.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sparse
from ortools.linear_solver.python import model_builder_helper

from planner.solver.problem import Floats

if TYPE_CHECKING:
    from planner.solver.branch import Branch

# Objective values are utilities in these units: around 2^10 at most.
_UTILITY_UNIT = 2.0**40


def dual_values(branch: Branch, seconds: float = math.inf) -> tuple[Floats, Floats] | None:
    """Prices of the metrics, (metrics,), and multipliers of the pairs, (pairs,).

    Both are in integer units of utility, per unit of cost and for a whole unit that is off, and not
    negative, but for tolerances. None where the program takes longer.
    """
    site, count = np.nonzero(branch.value > -np.inf)
    layers, shares, metrics = branch.layers, len(site), len(branch.room)
    room = np.maximum(branch.room, 1).astype(np.float64)
    worth = np.concatenate([branch.layer_utility, branch.gain[site, count]])
    cost = np.concatenate([branch.layer_cost, branch.cost[:, site, count]], axis=1) / room[:, None]
    # The shares of a site's counts add up to the share of its layer.
    sums = _matrix(
        (site, layers + np.arange(shares), 1.0),
        (branch.site_index, branch.site_layer, -1.0),
        shape=(branch.sites, layers + shares),
    )
    blocks: list[list[Any]] = [[sparse.csr_matrix(cost)], [sums]]
    upper = [branch.room / room, np.zeros(branch.sites)]
    pairs = 0
    if branch.pairs is not None:
        pairs, is_loss = len(branch.pairs.loss), branch.pairs.loss > 0
        worth = np.concatenate([worth, -branch.pairs.loss])
        running = np.flatnonzero(count)
        says_on = _matrix(
            (np.arange(layers), np.arange(layers), 1.0),
            (layers + site[running], layers + running, 1.0),
            shape=(layers + branch.sites, layers + shares),
        )
        one, other = says_on[branch.pairs.first], says_on[branch.pairs.second]
        # A loss: 1 - on_a - on_b <= z. A gain: z <= 1 - on_a and z <= 1 - on_b.
        sign = sparse.diags(np.where(is_loss, -1.0, 1.0), format="csr")
        blocks = [[block[0], None] for block in blocks]
        blocks.append([sign @ (one + sparse.diags(1.0 * is_loss) @ other), sign])
        blocks.append([other[~is_loss], sparse.eye(pairs, format="csr")[~is_loss]])
        upper += [sign.diagonal(), np.ones(int((~is_loss).sum()))]
    rows = sparse.bmat(blocks, format="csr")
    lower = np.full(rows.shape[0], -np.inf)
    lower[metrics : metrics + branch.sites] = 0.0
    # The stubs of this method name scalars where it takes arrays.
    model: Any = model_builder_helper.ModelBuilderHelper()
    model.fill_model_from_sparse_data(
        np.concatenate([np.where(branch.optional, 0.0, 1.0), np.zeros(shares + pairs)]),
        np.concatenate([np.ones(layers), np.full(shares, np.inf), np.ones(pairs)]),
        -worth / _UTILITY_UNIT,
        lower,
        np.concatenate(upper),
        rows,
    )
    solver = model_builder_helper.ModelSolverHelper("GLOP")
    solver.set_solver_specific_parameters("use_preprocessing: false")
    if seconds < math.inf:
        solver.set_time_limit_in_seconds(seconds)
    solver.solve(model)
    if solver.status() != model_builder_helper.SolveStatus.OPTIMAL:
        return None
    # A minimisation's duals of "<=" rows are not positive.
    dual = -np.asarray(solver.dual_values()) * _UTILITY_UNIT
    first = metrics + branch.sites
    return dual[:metrics] / room, dual[first : first + pairs]


def _matrix(*parts: tuple[Any, Any, float], shape: tuple[int, int]) -> Any:
    """A sparse matrix of constants, each at (rows, columns)."""
    rows, columns, values = zip(*((r, c, np.full(len(r), value)) for r, c, value in parts))
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_matrix(entries, shape=shape)
