"""Imports torch and transformers once, then runs each script that it is sent in a fork of itself.

It runs as a program, without this package. A request is a line of JSON, `{code, arguments, folder, environment}`, with three file
descriptors: for output, for errors, and for the number of the process and, once it has ended, its exit code.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
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
        line, places, _, _ = socket.recv_fds(channel, 1 << 16, 3)
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
    for place in places[:2]:
        os.close(place)
    os.write(places[2], f"{script}\n".encode())
    os.write(places[2], f"{os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])}\n".encode())
    os._exit(0)


def become(request: Any, places: list[int]) -> None:
    """Take on what a process of its own would have been started with."""
    for place, number in zip(places[:2], (1, 2), strict=True):
        os.dup2(place, number)
    for place in places:
        os.close(place)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = ["-c", *request["arguments"]]
    sys.modules["__main__"] = ModuleType("__main__")


assert not any(name.partition(".")[0] in ("armor_recipes", "compressed_tensors") for name in sys.modules)
gc.freeze()  # or every fork copies all of it when it ends
asked, files = requests(socket.socket(fileno=int(sys.argv[1])))
become(asked, files)
exec(compile(asked["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
