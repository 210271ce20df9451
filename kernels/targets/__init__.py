"""The kernels of one plan, for given GPUs: generated, compiled, and loaded to run.

Enters: a Graph, a Plan and a workload; at run time, launches. Leaves: readable sources, machine
code and their manifest; and launches served by them. In the order of the data:

    plan_launches       the ops that a plan calls, and the launches they make
    keys                what is known of a launch
    sources             one launch as one file
    partial_evaluation  its kernel with the known parameters in it
    tables              index tensors that are known, as arithmetic
    source_text         that kernel as text
    compilation         machine code for a GPU that is not here
    autotune            tiles by measurement
    manifest            the record of a folder
    build               all of this, as the files of a folder
    loaded_kernels      a folder at run time
"""
