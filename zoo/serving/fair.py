"""The waiting room: requests that the engine has no room for yet, in a fair order, and bounded.

    waiting   client a | 1 4 5 6 7        taken in turns: 1 2 3 4 8 5 6 7, so that who sends a thousand requests delays the
              client b | 2 8              others by one of them, not by a thousand
              client c | 3

Priorities go before turns: a request of a smaller number is taken before any of a larger one. Within a client and a priority,
first come is first served. Pure bookkeeping: no clock, no threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class WaitingRoom(Generic[T]):
    """At most ``most`` things that wait, each of a client and a priority."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._levels: dict[int, OrderedDict[str, deque[T]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether nothing more may come in."""
        return self._count >= self.most

    def put(self, thing: T, client: str, priority: int = 0) -> None:
        """Let something wait. The caller asks ``full`` first."""
        level = self._levels.setdefault(priority, OrderedDict())
        level.setdefault(client, deque()).append(thing)
        self._count += 1

    def take(self) -> T | None:
        """The next in turn; its client goes behind the others of its priority. None when nobody waits."""
        if not self._count:
            return None
        priority = min(self._levels)
        level = self._levels[priority]
        client, queue = level.popitem(last=False)
        thing = queue.popleft()
        if queue:
            level[client] = queue
        elif not level:
            del self._levels[priority]
        self._count -= 1
        return thing

    def remove(self, thing: T) -> bool:
        """Take something out wherever it stands; False if it does not wait."""
        for priority, level in self._levels.items():
            for client, queue in level.items():
                if thing in queue:
                    queue.remove(thing)
                    self._count -= 1
                    if not queue:
                        del level[client]
                    if not level:
                        del self._levels[priority]
                    return True
        return False

    def drain(self) -> list[T]:
        """Everything that waits, in turn; nothing waits afterwards."""
        taken = []
        while (thing := self.take()) is not None:
            taken.append(thing)
        return taken
