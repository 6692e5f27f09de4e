"""Measuring an engine: load that arrives, what each step computed, latencies, energy, cost, and the hardware's limit.

workload.py       cases, prompts, Poisson arrivals
loop.py           the run: who got a token when, and what each step was given; as little as possible beside the engine
latency.py        first tokens, gaps between tokens, whole requests: mean and percentiles
roofline.py       bytes and FLOPs that the steps had to move and compute, and the least time for that
energy.py         joules and memory of the GPU through NVML
configuration.py  what was measured, on what
report.py         a case as JSON and as a column of a table
plot.py           an SVG of a report
"""
