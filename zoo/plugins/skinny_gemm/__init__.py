"""Linear layers of few rows: another way to run ``ZooFp8Gemm`` and matrix products by a weight, beside cuBLASLt.

It is no zoo op. Decoding multiplies a handful of rows by every weight of the model, so the time is that of reading the weights,
and a GEMM made for many rows does not reach the memory's bandwidth. ``cuda.py`` says how to launch the kernels of ``kernels.py``,
which all engines have by default, and of ``early.py`` and ``stream.py``, which a hardware profile may choose.
"""
