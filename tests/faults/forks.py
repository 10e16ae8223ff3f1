"""Processes of `batchclf` that are forked from one which has imported it already.

Importing torch takes as long as all else that a small run does. A fork runs `batchclf.cli.main` as
the console script does; it is a process of its own, which signals reach and which ends by itself.

    the test -> a server, without threads -> for each process one that waits for its end -> it
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

MOST_BYTES = 1 << 17  # of a command with its environment
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Fork:
    """What of `subprocess.Popen[str]` is needed.

    Attributes:
        returncode: None until its end was waited for.
    """

    def __init__(self, stdout: int, stderr: int, status: int) -> None:
        self.stdout = open(stdout, "rb", buffering=0)  # noqa: SIM115 - closed in communicate
        self.stderr = open(stderr, "rb", buffering=0)  # noqa: SIM115
        self._status = open(status, "rb")  # noqa: SIM115
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def kill(self) -> None:
        """SIGKILL, unless its end was waited for."""
        if self.returncode is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                """It has just ended."""

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it wrote that was not read before."""
        deadline = time.monotonic() + timeout
        written = {self.stdout: b"", self.stderr: b""}
        with selectors.DefaultSelector() as open_pipes:
            for pipe in written:
                open_pipes.register(pipe, selectors.EVENT_READ)
            while open_pipes.get_map():
                ready = open_pipes.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    raise subprocess.TimeoutExpired("batchclf", timeout)
                for key, _ in ready:
                    pipe = self.stdout if key.fileobj is self.stdout else self.stderr
                    chunk = os.read(pipe.fileno(), 1 << 16)
                    written[pipe] += chunk
                    if not chunk:
                        open_pipes.unregister(pipe)
        self.returncode = int(self._status.readline())
        for file in (self.stdout, self.stderr, self._status):
            file.close()
        return written[self.stdout].decode(), written[self.stderr].decode()


class ForkServer:
    """Starts forks; see `forking`."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def start(self, args: Sequence[str | Path], env: Mapping[str, str]) -> Fork:
        """Start `batchclf` with these arguments, and no other variables than these.

        Those that count at the import alone, such as OMP_NUM_THREADS, are the server's.
        """
        pipes = [os.pipe() for _ in range(3)]  # standard output and error, and its fate
        command = json.dumps({"args": [*map(str, args)], "env": dict(env)}).encode()
        assert len(command) < MOST_BYTES
        socket.send_fds(self._control, [command], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        return Fork(*(read for read, _ in pipes))


@contextmanager
def forking(env: Mapping[str, str]) -> Iterator[ForkServer]:
    """A server of forks, with these variables; what it started dies with it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        server = subprocess.Popen(
            [sys.executable, __file__, str(its.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            env=env,
        )
        its.close()
        try:
            yield ForkServer(ours)
        finally:
            server.kill()
            server.wait()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def serve(control: socket.socket) -> None:
    """Fork for each command, until nobody is there to give one."""
    from batchclf.cli import main

    while True:
        command, pipes, _, _ = socket.recv_fds(control, MOST_BYTES, 3)
        if not command:
            return
        if os.fork() == 0:
            control.close()
            await_fork(json.loads(command), *pipes)
            sys.exit(main())  # in the innermost fork
        for pipe in pipes:
            os.close(pipe)


def await_fork(command: dict[str, dict[str, str]], stdout: int, stderr: int, status: int) -> None:
    """Fork once more, and tell the pid and the end of that process, which alone returns here."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent()
    pid = os.fork()
    if pid:
        os.close(stdout)
        os.close(stderr)
        os.write(status, b"%d\n" % pid)
        _, how = os.waitpid(pid, 0)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(how))
        os._exit(0)
    die_with_parent()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for pipe in (stdout, stderr, status):
        os.close(pipe)
    sys.argv = ["batchclf", *command["args"]]
    os.environ.clear()
    os.environ.update(command["env"])


if __name__ == "__main__":
    import batchclf.classify  # noqa: F401 - with all that takes long

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever waits for a fork leaves no zombie
    serve(socket.socket(fileno=int(sys.argv[1])))
