"""A progress bar of requests, on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zoo.runtime.request import Piece


def with_progress(pieces: Iterable[Piece], requests: int) -> Iterator[Piece]:
    """Pass pieces on beside a bar of finished requests."""
    from rich.console import Console
    from rich.progress import track

    shown = iter(track(range(requests), "generating", console=Console(stderr=True)))
    next(shown, None)
    for piece in pieces:
        yield piece
        if piece.finished:
            next(shown, None)
