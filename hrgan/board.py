"""Where each process says where it is: one key a process in a store that all of them reach.

Torch waits for ever for a store whose keeper is frozen or cut off, whatever its time-outs say. So only a thread of the
board's own talks to it, and whoever looks waits for that thread as long as it likes.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

POST_SECONDS = 1.0
"""Between two posts of where a process is."""


@dataclass(frozen=True)
class Post:
    """What a process says."""

    seconds: float
    """time.time() of its host."""
    nimg: float
    """Images seen, plus a part of a step; the process with the least is behind."""
    host: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}, on {self.host}"


@dataclass
class _Look:
    """A question to the board's thread."""

    ranks: tuple[int, ...]
    posts: list[Post] | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Board:
    """One process's posts, and its view of the others'. From `start` to `stop`."""

    def __init__(self, rank: int, store: Any) -> None:
        """store: the processes' torch.distributed store; the board makes a connection of its own."""
        self._rank, self._store = rank, store.clone()
        self._store.set_timeout(timedelta(seconds=10))
        self.closed = False
        """Whether the store is gone, and not only silent."""
        self._mine = b""
        self._asked: queue.SimpleQueue[_Look | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hrgan-board", daemon=True)

    def start(self, nimg: float, place: str) -> None:
        """Post for the first time, so that all are there before any looks, and go on in a thread."""
        self.post(nimg, place)
        self._store.set(_key(self._rank), self._mine)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that waits for the store is left behind."""
        self._asked.put(None)
        self._thread.join(POST_SECONDS)

    def post(self, nimg: float, place: str) -> None:
        """Say where this process is, at the thread's next turn."""
        self._mine = f"{time.time()}|{nimg}|{socket.gethostname()}|{place}".encode()

    def look(self, ranks: tuple[int, ...], seconds: float) -> list[Post] | None:
        """What these say now; None where the store does not answer in so many seconds."""
        if self.closed:
            return None
        look = _Look(ranks)
        self._asked.put(look)
        look.done.wait(seconds)
        return look.posts

    def _run(self) -> None:
        from torch.distributed import DistStoreError  # Rooms that need no torch import the watch too.

        while True:
            look = None
            try:
                with suppress(queue.Empty):
                    look = self._asked.get(timeout=POST_SECONDS)
                    if look is None:
                        return
                self._store.set(_key(self._rank), self._mine)
                if look is not None:
                    look.posts = [_read(post) for post in self._store.multi_get([_key(rank) for rank in look.ranks])]
            except DistStoreError:
                continue  # Too late for who asked.
            except RuntimeError:
                self.closed = True
                return
            finally:
                if look is not None:
                    look.done.set()


def _key(rank: int) -> str:
    return f"hrgan/place/{rank}"


def _read(post: bytes) -> Post:
    seconds, nimg, host, place = post.decode().split("|", 3)
    return Post(float(seconds), float(nimg), host, place)
