"""Who may use a captioner: one thread at a time, until it is closed; and what a forked child does with it."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ClosedError, TargetError


class Guard:
    """The lock of one captioner. A thread that holds it may take it again.

    ``forks``: whether a forked child can go on with what its parent opened. A CUDA context does not survive a fork.
    """

    def __init__(self, forks: bool = True) -> None:
        self.closed = False
        self._forks, self._process = forks, os.getpid()
        self._lock = threading.RLock()
        _guards.add(self)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Wait for other threads, then hold the captioner. ``ClosedError`` for one that was closed, ``TargetError`` in
        a forked child that cannot use it."""
        with self._lock:
            if self.closed:
                raise ClosedError("the captioner was closed: load it again")
            if not self._forks and os.getpid() != self._process:
                raise TargetError("a captioner on a GPU does not work in a forked child: load it there")
            yield

    @contextmanager
    def close(self) -> Iterator[bool]:
        """Wait for other threads, then hold the captioner to free what it has; False where it was closed before."""
        with self._lock:
            was_open, self.closed = not self.closed, True
            yield was_open

    def _after_fork(self) -> None:
        # The thread that held the lock may not exist in the child.
        self._lock = threading.RLock()


def leave_to_parent(session: Any) -> Any:
    """Mark an ONNX Runtime session: a forked child never destroys it.

    Its destructor joins the threads of its pool. A child has none of them and would wait for ever when it ends. The
    memory is the parent's, so that the child loses nothing.
    """
    _sessions.add(session)
    return session


def _after_fork() -> None:
    for guard in list(_guards):
        guard._after_fork()
    for session in list(_sessions):
        # The Python object and the C++ one behind it each get a reference that nobody gives back.
        for each in (session, getattr(session, "_sess", None)):
            if each is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
    _sessions.clear()


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()
_sessions: weakref.WeakSet[Any] = weakref.WeakSet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
