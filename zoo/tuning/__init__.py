"""Choices of kernels measured on the GPU at hand, as data: the ``tuning:`` section of a hardware profile.

    shapes.py       what an engine's plan launches: products, attention, rotary and row kernels, with their shapes
    bench.py        one GPU: variants compiled ahead of time as for an engine, run, compared, timed
    trial.py        variants of one kernel under the loads that matter, and which of them wins
    products.py     tilings of products of few rows, and up to how many rows they beat cuBLASLt
    attention.py    tiles of prefill and decode
    elementwise.py  tiles of the rotary kernel, warps of row kernels
    section.py      the YAML section: written, read again, merged
    run.py          all of it for one engine, within a time

A variant is whatever the kernels' ``lower`` makes of one candidate for the section, so what is timed is what is compiled. An
engine is built anew with the section; nothing is timed when one is opened.
"""
