"""Benchmarks beside other tools, in one run on one machine. Each script prints a table; its docstring says how to call it."""
