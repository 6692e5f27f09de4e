"""Kernels that start while the one before them still runs: programmatic dependent launch (PTX: griddepcontrol, SM 9.0).

It is no zoo op. Between two kernels of a stream the GPU runs dry for microseconds: the last programs of the first one finish,
the second one starts and waits for memory. A decode step of one sequence has ten kernels a layer, a third of whose time is that.
A kernel whose ``Kernel.overlaps`` is set may be launched so that its programs are resident before its predecessor is over.

What such a kernel owes, and what ``kernels.py`` has the words for:

    start_dependents()    first of all: the kernel after this one may start once every program of this one has come here
    wait_for_inputs()     before it reads what a kernel before it wrote, and before it writes at all. It returns when the
                          predecessor is over and its memory is visible; that one has waited for its own, and so on

Before the wait it may compute addresses and read weights, which no kernel of a step writes. Both are nothing where a launch does
not ask for overlap, and in Triton's interpreter.
"""
