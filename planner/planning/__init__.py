"""Planning: from a Graph and a budget to a Plan, by a Problem that the solver solves.

Enters: a model's config or Graph, a budget. Leaves: a `planner.plan.Plan`. Imports `planner.ir`,
`planner.plan` and `planner.solver`, and no torch.

    request            what to compile, as users ask for it
    catalog            what users call models -> their configs
    graph_cache        Graphs that were lowered before
    device_file        devices that were measured
    budgets            limits on metrics, as users write them
    switches           which axes a plan may use, how finely MLPs are divided
    selectors          token selectors and cache policies: arguments, counts, costs
    unit_counting      AdaLLaVA's switch sets, which count units instead of costs
    utilities          what switches are worth
    redundancy         what is lost together: no set of layers at a gain
    pricing            Graph, workload, budget -> Problem
    scored_stages      what token stages need, to score by attention
    config_sizes       what a stock config can say of a plan
    compiler           all of it, in order
    plan_costs         what a plan costs on another prompt
    prompt_costs       plans for any prompt, from a frontier that is computed once
    figures            what a plan's file states, computed again
"""
