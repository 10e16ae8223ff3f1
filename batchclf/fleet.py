"""One process for each device of this host, all with the same work: started, watched, stopped.

    parent: start -> pass on what members tell and log -> results, or the error that counts
    member: call(..., interrupt, tell) -> result

A member is stopped by word from its parent, never by the terminal's Ctrl-C, which would reach it a
second time. Where the parent is gone the members stop too. A member that a signal kills does not
stop the others: what they do is not lost, and the next run does the rest.
"""

import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from batchclf.errors import (
    EXIT_BUG,
    EXIT_INPUT,
    EXIT_TRY_AGAIN,
    EXIT_USAGE,
    BatchclfError,
    Interrupted,
)
from batchclf.log import sign

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

log = logging.getLogger(__name__)

R_co = TypeVar("R_co", covariant=True)

_POLL_S = 0.2  # how soon the parent sees that it was asked to stop
# What is not over by then is cut off, as in a run of one process: whoever sent SIGTERM sends
# SIGKILL 10 s later.
_GRACE_S = 20.0
# Of several errors the one that says most: a bug and a wrong setting come again, and what may pass
# is worth another run, after which only the bad inputs are left.
_RANKS = (EXIT_BUG, EXIT_USAGE, EXIT_TRY_AGAIN, EXIT_INPUT)

Tell = Callable[[Any], None]


class Work(Protocol[R_co]):
    """What a member does; a function of a module, since it is found by its name there."""

    def __call__(self, task: Any, interrupt: threading.Event, tell: Tell, /) -> R_co: ...


@dataclass(frozen=True)
class _Told:
    """Progress, for the parent's callback."""

    what: Any


@dataclass(frozen=True)
class _Ended(Generic[R_co]):
    """The last word of a member."""

    result: R_co | None = None
    error: BatchclfError | None = None


class _Member(Generic[R_co]):
    def __init__(self, name: str, work: Work[R_co], task: Any, num_threads: int) -> None:
        self.name = name
        self.ended: _Ended[R_co] | None = None
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.up, their_up = context.Pipe(duplex=False)
        their_down, self._down = context.Pipe(duplex=False)
        level = logging.getLogger("batchclf").getEffectiveLevel()
        self.process: SpawnProcess = context.Process(
            target=_live,
            args=(their_up, their_down, work, task, num_threads, level),
            name=name,
        )
        self.process.start()
        their_up.close()  # so that its end shows here
        their_down.close()

    def stop(self) -> None:
        """Ask it to stop, as SIGTERM does; it has seconds for it."""
        self._down.close()

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()

    def failure(self) -> BatchclfError | None:
        """Why there is no result, once the process is over."""
        if self.ended is not None:
            return self.ended.error
        code = self.process.exitcode or 0
        if code < 0:
            return Interrupted(
                f"the process of {self.name} was killed by {signal.Signals(-code).name}; run the "
                "same command again to go on"
            )
        if code == EXIT_TRY_AGAIN:
            return Interrupted(f"the process of {self.name} did not stop in time and was cut off")
        return BatchclfError(
            f"the process of {self.name} ended with {code}, which is a bug in batchclf; please "
            "report it with the traceback above"
        )


def run_fleet(
    work: Work[R_co],
    tasks: Sequence[tuple[str, Any]],
    interrupt: threading.Event,
    on_told: Callable[[Any], None],
) -> list[R_co]:
    """Do all tasks side by side, each in a process of its own.

    Args:
        work: given one task, the event that asks it to stop, and what to call with progress.
        tasks: the name of each member, such as its device, and what `work` is given; both that
            and the result travel by pickle.
        interrupt: when set, all members are asked to stop.
        on_told: gets the progress of all of them, in this thread.

    Returns:
        The results, in the order of the tasks.

    Raises:
        BatchclfError: that of the member whose error says most, once all are over.
    """
    num_threads = max(_num_cores() // len(tasks), 1)
    members: list[_Member[R_co]] = []
    try:
        members.extend(_Member(name, work, task, num_threads) for name, task in tasks)
        errors = _watch(members, interrupt, on_told)
    finally:
        for member in members:
            member.kill()
    if errors:
        errors.sort(key=lambda error: _RANKS.index(error.exit_code))
        for error in errors[1:]:
            log.error("%s", error)
        raise errors[0]
    return [member.ended.result for member in members if member.ended]  # type: ignore[misc]


def _watch(
    members: Sequence[_Member[Any]], interrupt: threading.Event, on_told: Callable[[Any], None]
) -> list[BatchclfError]:
    """Until all are over; where one ends by an error of its own, the others are stopped."""
    running = list(members)
    errors: list[BatchclfError] = []
    stopped_for: BatchclfError | None = None
    while running:
        if interrupt.is_set() or stopped_for:
            for member in running:
                member.stop()
        ready = wait([member.up for member in running], timeout=_POLL_S)
        over = [each for each in running if each.up in ready and not _listen(each, on_told)]
        for member in over:
            running.remove(member)
            member.process.join()
            error = member.failure()
            if error is None:
                continue
            if stopped_for and member.ended and isinstance(error, Interrupted):
                continue  # for the sake of another's error
            errors.append(error)
            if member.ended is not None:
                stopped_for = error  # one process alone would have ended here
    return errors


def _listen(member: _Member[Any], on_told: Callable[[Any], None]) -> bool:
    """Take one message; False when the member has no more to say."""
    try:
        message = member.up.recv()
    except (EOFError, OSError):  # over, perhaps in the midst of a message
        return False
    if isinstance(message, _Ended):
        member.ended = message
    elif isinstance(message, _Told):
        on_told(message.what)
    else:
        sign(message, member.name)
        logging.getLogger(message.name).handle(message)
    return True


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Line:
    """A member's line to its parent, for all its threads."""

    def __init__(self, up: Connection, interrupt: threading.Event) -> None:
        self._up = up
        self._interrupt = interrupt
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        try:
            with self._lock:
                self._up.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._interrupt.set()  # the parent is gone

    def tell(self, what: Any) -> None:
        self.send(_Told(what))


class _SendingHandler(logging.handlers.QueueHandler):
    """Sends log records home, so that lines of several processes do not mix."""

    def __init__(self, line: _Line) -> None:
        super().__init__(queue=None)  # type: ignore[arg-type]
        self._line = line

    def enqueue(self, record: logging.LogRecord) -> None:
        self._line.send(record)


def _live(
    up: Connection,
    down: Connection,
    work: Work[Any],
    task: Any,
    num_threads: int,
    level: int,
) -> None:
    """A member's whole life."""
    # The tokeniser would start a thread for each core of the host.
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))
    interrupt = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the parent as well
    signal.signal(signal.SIGTERM, lambda _number, _frame: interrupt.set())
    line = _Line(up, interrupt)
    logger = logging.getLogger("batchclf")
    logger.handlers[:] = [_SendingHandler(line)]
    logger.setLevel(level)
    logger.propagate = False
    threading.Thread(target=_obey, args=(down, interrupt), name="obey", daemon=True).start()
    try:
        result = work(task, interrupt, line.tell)
    except BatchclfError as error:
        line.send(_Ended(error=error))
    except MemoryError as error:
        line.send(_Ended(error=Interrupted(f"out of memory: {error}")))
    else:
        line.send(_Ended(result=result))


def _obey(down: Connection, interrupt: threading.Event) -> None:
    """Wait for the parent to hang up: it asks to stop, or is gone."""
    try:
        down.recv()
    except (EOFError, ConnectionResetError):
        interrupt.set()
    timer = threading.Timer(_GRACE_S, os._exit, [EXIT_TRY_AGAIN])
    timer.daemon = True
    timer.start()
