"""Finding stop strings in text that arrives in pieces (Knuth, Morris and Pratt 1977), with work linear in the new text."""

from __future__ import annotations

from collections.abc import Iterable


class _Pattern:
    """One stop string and how much of it the text ends with."""

    __slots__ = ("borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # borders[n]: the longest proper prefix of text[:n] that is also its suffix
        self.borders = [0, 0]
        for character in text[1:]:
            border = self.borders[-1]
            while border and text[border] != character:
                border = self.borders[border]
            self.borders.append(border + (text[border] == character))

    def feed(self, character: str) -> bool:
        while self.matched and self.text[self.matched] != character:
            self.matched = self.borders[self.matched]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class StopMatcher:
    """Passes text on until a stop string is complete, and holds back what may yet become one.

    How the text is cut into pieces changes nothing: the stop string that is completed first counts, and of several completed
    by the same character the longest.
    """

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        self._patterns = [_Pattern(stop) for stop in dict.fromkeys(stops)]
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to pass on, the stop string found or None). After a stop string was found, nothing more may be pushed."""
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            found = [pattern.text for pattern in self._patterns if pattern.feed(character)]
            if found:
                stop = max(found, key=len)
                self._held = ""
                return whole[: end if self._include else end - len(stop)], stop
        keep = max((pattern.matched for pattern in self._patterns), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep], None

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held
