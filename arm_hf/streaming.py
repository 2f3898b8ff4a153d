"""Work that flows: threads that prepare ahead, batches of equal shape, threads that write behind.

Threads, not processes: decoding, resizing and compressing pictures release the interpreter's lock, nothing has to be
copied between processes, and an accelerator is never forked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor | None]:
    """A pool of threads that each use one core; `None` for 0. What has not begun when the block ends is dropped."""
    if count == 0:
        yield None
        return
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def mapped_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], pool: ThreadPoolExecutor | None, ahead: int
) -> Iterator[Result]:
    """Apply a function to items in order, in a pool of threads at most `ahead` items before they are asked for.

    Args:
        function: Applied to each item.
        items: Read no further than is asked for and `ahead`.
        pool: Threads; None applies the function when an item is asked for.
        ahead: Most items under way.
    """
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batched_by(
    key: Callable[[Item], Hashable], items: Iterable[Item], size: int, most_waiting: int
) -> Iterator[list[Item]]:
    """Group items of equal key into batches of `size`.

    Args:
        key: What the members of a batch must have in common.
        items: The items.
        size: Items in a full batch.
        most_waiting: Items that may wait for others of their kind; beyond that the largest group goes as it is.
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        kind = key(item)
        group = groups.setdefault(kind, [])
        group.append(item)
        if len(group) == size:
            yield groups.pop(kind)
        elif sum(map(len, groups.values())) > most_waiting:
            yield groups.pop(max(groups, key=lambda each: len(groups[each])))
    yield from groups.values()


class WriteBehind:
    """Calls that run in a pool of threads while other work goes on, a bounded number at a time.

    Args:
        pool: The threads; `None` runs every call at once.
        most_waiting: Calls that may be under way before `put` waits.
    """

    def __init__(self, pool: ThreadPoolExecutor | None, most_waiting: int):
        self.pool, self.most_waiting = pool, most_waiting
        self._waiting: deque[Future[Any]] = deque()

    def put(self, function: Callable[..., Result], *arguments: Any) -> Iterator[Result]:
        """Start a call; yield the results of those that are finished, in the order in which they were started.

        Args:
            function: What to call.
            arguments: Its arguments.
        """
        if self.pool is None:
            yield function(*arguments)
            return
        self._waiting.append(self.pool.submit(function, *arguments))
        while self._waiting and (len(self._waiting) > self.most_waiting or self._waiting[0].done()):
            yield self._waiting.popleft().result()

    def rest(self) -> Iterator[Any]:
        """Yield the results of all calls that are under way."""
        while self._waiting:
            yield self._waiting.popleft().result()
