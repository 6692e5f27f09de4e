"""CUDA without torch, triton or a compiler: what a ``cuda`` session stands on.

    driver.py      one GPU through the driver: memory, streams, events, kernels from cubins, graphs
    arguments.py   the argument blocks of kernel launches
    cublaslt.py    GEMMs of cuBLASLt, through ctypes
    runs.py        recipes that are runs of bytes in files
    streaming.py   file pieces through pinned memory to the GPU, reading and copying at once
    weights.py     a weight table on the GPU: recipes planned, files streamed, matrices quantized
    checks.py      plan and manifest read as hostile; table.py, the weight table and the checkpoint under it
    loading.py     an engine's files on the GPU
    program.py     a launch plan with addresses in it; gemms.py, its products; steps.py and inputs.py, what a step sends

Needs cuda-bindings, the nvidia-cublas wheel for GEMMs, numpy and ml_dtypes. Addresses and handles are plain integers.
"""
