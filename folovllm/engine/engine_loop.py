"""One loop for the callers of an engine, whatever threads they are in.

    thread A: step_for ─ leads: step, step, ...     B's requests are in A's steps, and A hands B its outputs
    thread B: enqueue (between two steps), step_for ─ follows: waits for outputs, or until nobody leads

There is no thread of its own. The first thread that wants outputs leads: it runs steps, for all callers' requests. The
others follow. A leader that returns to its caller wakes a follower, which leads if the leader does not come back first.
So a program with one thread has the same steps as without this module, in its own thread, with exceptions and
interrupts where they arise; nothing has to be started, stopped or left behind; and torch's settings of a thread are
those of a caller. A server may give the loop a thread of its own: one that always wants outputs.

Invariants:
  1. The engine's state is read and changed in a turn, and turns never overlap. A step is a turn.
  2. A step begins after the turns that were asked for before it, so that new requests join running ones.
  3. A follower waits only while another thread is in a step. An interrupt may end a thread before it has woken the next
     one, therefore nobody waits longer than `LOOK_AGAIN` without a look.
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
    """A caller that waits. `ready` is called in a turn, by any thread: the caller's outputs, or None to wait on."""

    def __init__(self, ready: Callable[[], T | None]) -> None:
        self._ready = ready
        self.woken = threading.Event()
        self.outputs: T | None = None
        self.error: BaseException | None = None

    def settle(self) -> bool:
        """Take what is ready. Whether the caller need not wait any longer."""
        if self.outputs is None and self.error is None:
            try:
                self.outputs = self._ready()
            except BaseException as error:  # raised where it belongs: in the caller's thread
                self.error = error
        if self.outputs is None and self.error is None:
            return False
        self.woken.set()
        return True


class EngineLoop:
    """Turns at an engine. See the invariants above."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: an observer of a step may call the engine
        self._owner = 0  # the thread whose turn it is
        self._stepping = False
        self._arrivals: set[threading.Event] = set()  # of threads that wait for their turn
        self._followers: dict[Follower[Any], None] = {}
        self._dropped: deque[Callable[[], object]] = deque()

    def turn(self, work: Callable[[], T]) -> T:
        """Run `work` while no step runs."""
        arrival = threading.Event()
        try:
            # Inside `try`, and the lock by `with`: an interrupt finds no place between taking and giving back.
            self._arrivals.add(arrival)
            with self._lock:
                outer, self._owner = self._owner, threading.get_ident()
                try:
                    return work()
                finally:
                    self._owner = outer
        finally:
            arrival.set()
            self._arrivals.discard(arrival)
            self._run_dropped()

    def outputs(self, ready: Callable[[], T | None], step: Callable[[], T], shared: Callable[[], bool]) -> T:
        """What is `ready`, else the outputs of `step`, unless another thread's step comes first and makes some ready.

        shared: whether other threads have requests in a step. An exception of `ready` or `step` is raised here.
        """
        me = Follower(ready)
        try:
            self._followers[me] = None
            while me.outputs is None and me.error is None:
                me.woken.clear()
                nested = self._owner == threading.get_ident()
                if self._stepping and not nested:
                    me.woken.wait(LOOK_AGAIN)
                    continue
                for arrival in [] if nested else list(self._arrivals):
                    arrival.wait(LOOK_AGAIN)
                self.turn(lambda: self._lead(me, step, shared))
            if me.error is not None:
                raise me.error
            return me.outputs  # type: ignore[return-value]  # not None here
        finally:
            self._followers.pop(me, None)
            for follower in list(self._followers)[:1]:
                follower.woken.set()

    def settle_followers(self) -> None:
        """In a turn: hand out what has become ready."""
        for follower in list(self._followers):
            follower.settle()

    def drop(self, work: Callable[[], object]) -> None:
        """Run `work` in a turn, now if nobody has one, else after it. For finalizers, which must not wait."""
        self._dropped.append(work)
        self._run_dropped()

    def _lead(self, me: Follower[T], step: Callable[[], T], shared: Callable[[], bool]) -> None:
        if me.settle():
            return
        self._followers.pop(me, None)
        outer, self._stepping = self._stepping, True
        with interrupts_wait(shared()):
            try:
                me.outputs = step()
            finally:
                self._stepping = outer
                self.settle_followers()

    def _run_dropped(self) -> None:
        # Who finds the lock taken leaves the work to its holder, who looks here after giving it back.
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                if self._owner:
                    return  # inside of a turn of this very thread
                self._owner = threading.get_ident()
                try:
                    self._dropped.popleft()()
                finally:
                    self._owner = 0
            finally:
                self._lock.release()


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
