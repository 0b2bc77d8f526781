"""Imports torch and transformers once, then runs each script that it is sent in a fork of itself.

It runs as a program, without this package. A request is a line of JSON, `{code, arguments, folder, environment}`, with four file
descriptors: of input, output and errors, and one for the number of the process and, once it has ended, its exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import traceback
from types import ModuleType
from typing import Any

import torch  # noqa: F401 - what takes most of a script's time
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.pipelines  # noqa: F401


def requests(channel: socket.socket) -> tuple[Any, list[int]]:
    """The next request, in a process for it alone; this one goes on to listen, and ends with its channel."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        line, places, _, _ = socket.recv_fds(channel, 1 << 16, 4)
        while line and not line.endswith(b"\n"):
            line += channel.recv(1 << 16)
        if not line:
            os._exit(0)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            channel.close()
            if not (script := os.fork()):
                return json.loads(line), places
            watch(script, places)
        for place in places:
            os.close(place)


def watch(script: int, places: list[int]) -> None:
    """Tell how the script ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for place in places[:3]:
        os.close(place)
    os.write(places[3], f"{script}\n".encode())
    os.write(places[3], f"{os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])}\n".encode())
    os._exit(0)


def become(request: Any, places: list[int]) -> None:
    """Take on what a process of its own would have been started with."""
    for number, place in enumerate(places[:3]):
        os.dup2(place, number)
    for place in places:
        os.close(place)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = ["-c", *request["arguments"]]
    sys.modules["__main__"] = ModuleType("__main__")
    open_streams()


def open_streams() -> None:
    """As the interpreter opens them."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    options: Any = {"encoding": encoding or None, "closefd": False}
    sys.stdin = sys.__stdin__ = os.fdopen(0, errors=errors or None, **options)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", errors=errors or None, **options)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", **options)  # type: ignore[misc]


def run(script: str) -> int:
    """The exit code of a script."""
    try:
        exec(compile(script, "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


assert not any(name.partition(".")[0] in ("armor_recipes", "compressed_tensors") for name in sys.modules)
asked, files = requests(socket.socket(fileno=int(sys.argv[1])))
become(asked, files)
code = run(asked["code"])
# Not as the interpreter ends, which would look at all that was imported, and copy it.
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
