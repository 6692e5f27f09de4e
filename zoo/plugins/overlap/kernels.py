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


@triton.jit
def prefetch_bulk(places, SIZE: tl.constexpr):
    """As ``prefetch``, SIZE bytes from each of ``places`` on; both are multiples of 16. Each is an instruction of its warp."""
    tl.static_assert(SIZE > 0 and SIZE % 16 == 0)
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [places.to(tl.int64), tl.full(places.shape, SIZE, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
