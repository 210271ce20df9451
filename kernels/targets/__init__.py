"""The kernels of one plan, for given GPUs: generated, compiled, and loaded to run.

Enters: a Graph, a Plan and a workload; at run time, launches. Leaves: readable sources, machine
code and their manifest; and launches served by them. May import `planner.kernels` and what that
may. In the order of the data:

    plan_launches.py   the ops that a plan calls, and the launches they make
    keys.py            what is known of a launch
    sources.py         one launch as one file; specialise.py, printing.py and tables.py write it
    compilation.py     machine code for a GPU that is not here
    autotune.py        tiles by measurement
    manifest.py        the record of a folder
    build.py           all of this, as the files of a folder
    loading.py         a folder at run time
"""
