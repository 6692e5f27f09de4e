"""From the start of a process to its first token, weights on disk or in the page cache.

    python -m pipelines.bench.cold_start REGISTRY REF --checkpoint FOLDER [--rounds 2]

FOLDER is what `pipelines.bench.gpu ... --work FOLDER --keep` leaves, or any checkpoint of the model. Each round pushes the files'
pages out of the cache (POSIX_FADV_DONTNEED behind fsync; what stays is counted with mincore), runs a new Python process to its
first token, and another one while the pages are still there. The rate at which the disk alone gives the same bytes stands beside
it (O_DIRECT where the file system has it), since that is the floor.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

CHILD = """
import sys, time
from zoo import LLM, SamplingParams
ref, registry, checkpoint = sys.argv[1:]
llm = LLM(ref, registry=registry, checkpoint=checkpoint)
llm.generate([[1] * 128], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
print(time.time(), flush=True)
"""
PIECE = 16 << 20


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def evict(files: list[Path]) -> None:
    """Write the files' dirty pages out and ask the kernel to drop them all."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(files: list[Path]) -> float:
    """The share of the files' pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = pages = 0
    for path in files:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as view,
        ):
            count = -(-len(view) // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * count)()
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(view)), flags):
                raise OSError(ctypes.get_errno(), f"mincore {path}")
            here, pages = here + sum(byte & 1 for byte in bytes(flags)), pages + count
    return here / max(pages, 1)


def read_rate(files: list[Path]) -> float:
    """Bytes a second of reading the files in order, past the page cache where that is possible."""
    evict(files)
    buffer, read, started = mmap.mmap(-1, PIECE), 0, time.perf_counter()
    for path in files:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            descriptor = os.open(path, os.O_RDONLY)
        try:
            while count := os.readv(descriptor, [buffer]):
                read += count
                if count < PIECE:
                    break
        finally:
            os.close(descriptor)
    return read / (time.perf_counter() - started)


def start(ref: str, registry: Path, checkpoint: Path) -> float:
    """Seconds from the start of a new process to its first token."""
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, ref, str(registry), str(checkpoint)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1]) - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry", type=Path)
    parser.add_argument("ref")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    files = files_of(arguments.checkpoint)
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 1e9:.1f} GB in {len(files)} files; the disk alone gives {read_rate(files) / 1e9:.2f} GB/s\n")
    print("| round | weights | in the page cache | start to first token, s |\n| --- | --- | --- | --- |")
    for number in range(arguments.rounds):
        for kind in ("disk", "page cache"):
            if kind == "disk":
                evict(files)
            share = resident(files)
            print(
                f"| {number + 1} | {kind} | {share:.0%} | {start(arguments.ref, arguments.registry, arguments.checkpoint):.1f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
