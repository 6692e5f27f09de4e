"""Kernels for ONNX's own elementwise operators and norms: what is left of a graph around GEMMs and attention.

There is no contract and no body here: these nodes mean what ONNX says. ``cuda.py`` has the list of those that the ``cuda``
target can launch; ``tile.py`` says how tensors are cut, for zoo ops too.
"""
