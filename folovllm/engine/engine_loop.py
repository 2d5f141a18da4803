"""One loop for the callers of an engine, whatever threads they are in.

    thread A: step_for ─ leads: step, step, ...     B's requests are in A's steps, and A hands B its outputs
    thread B: enqueue (between two steps), step_for ─ follows: waits for outputs, or until there is no leader

There is no thread of its own. The first thread that wants outputs leads: it runs steps, for all callers' requests. The
others follow. A leader that returns to its caller wakes a follower, which leads if the leader does not come back first.
So a program with one thread has the same steps as without this module, in its own thread, with exceptions and
interrupts where they arise; nothing has to be started, stopped or left behind; and torch's settings of a thread are
those of a caller. A server may give the loop a thread of its own: one that always wants outputs.

Invariants:
  1. The engine's state is read and changed in a turn, and turns never overlap. A step is a turn.
  2. A step begins after the turns that were asked for before it, so that new requests join running ones.
  3. A follower waits only while another thread is in a step. An interrupt may end a thread before it has woken the next
     one, therefore no thread waits longer than `LOOK_AGAIN` without a look.
  4. No lock is held while a caller's code runs, except the observer of a step, which is a part of it.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

LOOK_AGAIN = 1.0  # seconds

T = TypeVar("T")
P = ParamSpec("P")


class Follower(Generic[T]):
    """A caller that wants outputs.

    `ready` is called in a turn, perhaps by another thread: the caller's outputs, or the error to raise in it, or None
    to wait on.
    """

    def __init__(self, ready: Callable[[], T | Exception | None]) -> None:
        self._ready = ready
        self.outputs: T | Exception | None = None
        self.woken = threading.Event()
        self.arrived = threading.Event()

    def settle(self) -> bool:
        """Take what is ready. Whether that is all the caller waits for."""
        if self.outputs is None:
            self.outputs = self._ready()
        if self.outputs is not None:
            self.woken.set()
        return self.outputs is not None

    def result(self) -> T:
        """The outputs. Raises the error that came in their place."""
        if self.outputs is None:
            raise RuntimeError("a caller went on without outputs")
        if isinstance(self.outputs, Exception):
            raise self.outputs
        return self.outputs


class EngineLoop:
    """Turns at an engine. See the invariants above::

        with loop.following(ready) as me:
            while loop.wait(me):
                with loop.lock, loop.leading(me, shared) as leads:
                    if leads:
                        me.outputs = a step
        return me.result()

    `ready` and `shared` are those of `Follower` and `leading`.
    """

    def __init__(self) -> None:
        # Reentrant: an observer of a step may call the engine. Taken by `with`, where no interrupt comes between
        # taking and giving back. What is noted beside it only saves waiting for it.
        self.lock = threading.RLock()
        self._owner = 0  # the thread whose turn it is
        self._stepping = False
        self._arrivals: set[threading.Event] = set()  # of threads that wait for their turn
        self._followers: dict[Follower[Any], None] = {}
        self._dropped: deque[Callable[[], object]] = deque()

    def turn(self, work: Callable[[], T]) -> T:
        """Run `work` while no step runs."""
        arrival = threading.Event()
        try:
            self._arrivals.add(arrival)
            with self.lock:
                outer, self._owner = self._owner, threading.get_ident()
                try:
                    return work()
                finally:
                    self._owner = outer
        finally:
            self._leave(arrival)

    @contextmanager
    def following(self, ready: Callable[[], T | Exception | None]) -> Iterator[Follower[T]]:
        """A caller, until it has its outputs. Then the next one may lead."""
        me = Follower(ready)
        try:
            self._followers[me] = None
            yield me
        finally:
            self._followers.pop(me, None)
            self._leave(me.arrived)
            for follower in list(self._followers)[:1]:
                follower.woken.set()

    def wait(self, me: Follower[Any]) -> bool:
        """Wait while another thread is in a step, and for turns that come first. False once the caller has outputs."""
        if self._owner != threading.get_ident():
            while me.outputs is None and self._stepping:
                if not me.woken.wait(LOOK_AGAIN):
                    break
                me.woken.clear()
            for arrival in list(self._arrivals):
                arrival.wait(LOOK_AGAIN)
            me.arrived.clear()
            self._arrivals.add(me.arrived)
        return me.outputs is None

    @contextmanager
    def leading(self, me: Follower[Any], shared: Callable[[], bool]) -> Iterator[bool]:
        """A step of this thread, in a turn. False: it is not needed, because the caller's outputs are there.

        shared: whether other threads have requests in the step.
        """
        outer = self._owner, self._stepping
        self._owner = threading.get_ident()
        try:
            if me.settle():
                yield False
                return
            self._followers.pop(me, None)  # what is ready from here on is for the caller to return or to ask for
            self._stepping = True
            with interrupts_wait(shared()):
                try:
                    yield True
                finally:
                    self.settle_followers()
        finally:
            self._owner, self._stepping = outer
            me.arrived.set()

    def settle_followers(self) -> None:
        """In a turn: hand out what has become ready."""
        for follower in list(self._followers):
            follower.settle()

    def drop(self, work: Callable[[], object]) -> None:
        """Run `work` in a turn, at once if there is no other, else after it. For finalizers, which must not wait."""
        self._dropped.append(work)
        self._run_dropped()

    def _leave(self, arrival: threading.Event) -> None:
        arrival.set()
        self._arrivals.discard(arrival)
        self._run_dropped()

    def _run_dropped(self) -> None:
        # If the lock is taken, its holder does the work: it looks here after giving it back.
        while self._dropped and self.lock.acquire(blocking=False):
            try:
                if self._owner == threading.get_ident():
                    return  # inside of a turn of this very thread
                self._owner = threading.get_ident()
                try:
                    self._dropped.popleft()()
                finally:
                    self._owner = 0
            finally:
                self.lock.release()


class HasLoop(Protocol):
    """What has an `EngineLoop`."""

    loop: EngineLoop


def between_steps(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Run a method of an engine in a turn of its loop."""

    @wraps(method)
    def in_turn(self: HasLoop, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.loop.turn(lambda: method(self, *args, **kwargs))

    return in_turn


@contextmanager
def interrupts_wait(active: bool) -> Iterator[None]:
    """Let a Ctrl-C wait for the end of the block, so that it costs no other thread its step. A second one does not.

    Only the main thread is interrupted, so only there it does anything.
    """
    before = signal.getsignal(signal.SIGINT)
    if not active or not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            before(number, frame)
        came.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(came[0], None)
