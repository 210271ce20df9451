from planner.solver.exact import solve
from planner.solver.solution import Infeasible, Solution
