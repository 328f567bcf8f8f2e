"""lmtrain in forks of a process that has imported it: a command without the seconds of its imports.

A fork is a process of its own, with its own streams, folder, environment and exit code, of a
server that has computed nothing. What Python and torch read when they start is the server's: a test
of that needs a new process.
"""

import atexit
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from types import TracebackType
from typing import Self

# Variables that a fork may have otherwise than the server: lmtrain reads them when it needs them.
READ_WHEN_USED = {"HOME", "LMTRAIN_CACHE", "LMTRAIN_KERNELS", "TMPDIR"}


class ForkServer:
    """Inside its block, runs commands one after the other."""

    def __enter__(self) -> Self:
        self._connection, theirs = Pipe()
        # Python sets its streams up as for a command whose streams are pipes.
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._connection.close()
        self._process.communicate()

    def run(
        self, folder: Path, words: list[str], stdin: bytes, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs `lmtrain words` in a folder; what `subprocess.run` gives.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time; it is killed.
        """
        assert env.keys() <= READ_WHEN_USED, "read when Python or torch starts: use a new process"
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = (
            os.pipe() for _ in range(3)
        )
        self._connection.send((str(folder), words, {**os.environ, **env}))
        for descriptor in (theirs_in, theirs_out, theirs_err):
            send_handle(self._connection, descriptor, self._process.pid)
            os.close(descriptor)
        with ThreadPoolExecutor() as pool:
            pool.submit(_write, ours_in, stdin)
            stdout, stderr = (pool.submit(_read, each) for each in (ours_out, ours_err))
            process = self._connection.recv()
            if not self._connection.poll(timeout):
                os.kill(process, signal.SIGKILL)
                raise subprocess.TimeoutExpired(words, timeout)
            code = os.waitstatus_to_exitcode(self._connection.recv())
            return subprocess.CompletedProcess(words, code, stdout.result(), stderr.result())


def _write(descriptor: int, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def _read(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def _serve(connection: "Connection[object, object]") -> None:
    """Forks for each command; returns in the forks alone, and ends with the connection."""
    while True:
        try:
            folder, words, environment = connection.recv()
        except EOFError:
            sys.exit()
        streams = [recv_handle(connection) for _ in range(3)]
        process = os.fork()
        if not process:
            connection.close()
            _become(folder, words, environment, streams)
            return
        for descriptor in streams:
            os.close(descriptor)
        connection.send(process)
        connection.send(os.waitpid(process, 0)[1])


def _become(folder: str, words: list[str], environment: dict[str, str], streams: list[int]) -> None:
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = ["lmtrain", *words]


if __name__ == "__main__":
    # The first update of a training imports it, in two seconds.
    import torch._dynamo  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import lmtrain.training.run  # noqa: F401
    from lmtrain.cli.main import main

    assert len([*Path("/proc/self/task").iterdir()]) == 1, (
        "a fork would lack this process's threads"
    )
    # Lest the forks' collections copy all that they share with the server.
    gc.freeze()
    _serve(Connection(int(sys.argv[1])))
    try:
        main()
    except SystemExit as end:
        # As Python ends, but for taking its modules apart, which takes longer than most commands.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)
