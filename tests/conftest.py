"""Triton kernels run in Triton's interpreter here: it is chosen by the environment when a kernel's module is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
