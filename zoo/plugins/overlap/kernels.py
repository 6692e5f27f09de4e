"""What a kernel says to the GPU about its neighbours in a stream; see ``zoo.plugins.overlap``."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def start_dependents():
    """The next kernel of the stream may start once all programs of this one have said so, or are over."""
    if not INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs():
    """Wait until the kernels before this one are over; nothing that they write may be read, and nothing written, before."""
    if not INTERPRETED:
        gdc_wait()


@triton.jit
def prefetch(places):
    """Ask for the 32 bytes around each of ``places`` to be brought into the L2 cache, and do not wait."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [places.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
