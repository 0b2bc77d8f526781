"""Scripts in processes of their own that need not import torch and transformers again: forks of one that has."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from types import MappingProxyType, TracebackType

PROGRAM = Path(__file__).with_name("fork_program.py")


class Fork:
    """A script that was started: what the tests use of `subprocess.Popen`."""

    def __init__(self, stdout: int, stderr: int, status: int) -> None:
        self.stdout, self.stderr, self.status = (os.fdopen(p, encoding="utf-8") for p in (stdout, stderr, status))
        self.pid = int(self.status.readline())
        self.returncode: int | None = None

    def __enter__(self) -> Fork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        for file in (self.stdout, self.stderr):
            file.close()

    def wait(self) -> int:
        """Its exit code, negative where a signal ended it."""
        if self.returncode is None:
            with self.status:
                self.returncode = int(self.status.readline())
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """One that is gone is sent nothing."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """What it prints from now on to both files, when it has ended; one that takes longer is killed."""
        late = Timer(timeout, self.kill)
        late.start()
        try:
            with self, ThreadPoolExecutor(1) as pool:
                errors = pool.submit(self.stderr.read)
                return self.stdout.read(), errors.result()
        finally:
            late.cancel()


class Forks:
    """The process that has torch and transformers, and not this package; started when first used."""

    def __init__(self) -> None:
        self.channel: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.channel and self.process:
            self.channel.close()
            self.process.wait(30)

    def connected(self) -> socket.socket:
        if self.channel is None:
            self.channel, theirs = socket.socketpair()
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", str(PROGRAM), str(theirs.fileno())],
                    env={**environment, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        return self.channel

    def start(
        self,
        code: str,
        *arguments: object,
        folder: Path,
        environment: Mapping[str, str],
        streams: Mapping[int, int] = MappingProxyType({}),
    ) -> Fork:
        """Start a script as `python -c CODE ARGUMENTS` in a working directory.

        `streams` are descriptors by the number that the script knows them by, 0 to 2; the others are nothing, and two pipes.
        """
        request = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "environment": dict(environment),
        }
        ours, theirs = zip(os.pipe(), os.pipe(), os.pipe(), strict=True)
        nothing = os.open(os.devnull, os.O_RDONLY)
        given = [streams.get(number, place) for number, place in enumerate((nothing, *theirs))]
        socket.send_fds(self.connected(), [json.dumps(request).encode() + b"\n"], given)
        for place in (nothing, *theirs):
            os.close(place)
        return Fork(*ours)

    def run(self, code: str, *arguments: object, folder: Path, path: Path | None = None) -> str:
        """What a script prints that ends well; modules of `path`, of nothing else outside of the environment, are found."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PYTHONPATH": str(path)} if path else {}
        running = self.start(code, *arguments, folder=folder, environment=environment)
        out, err = running.communicate()
        assert running.returncode == 0, err
        return out
