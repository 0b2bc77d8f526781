"""Output that cannot be written: nobody reads it, the disk is full, the encoding is too small, the terminal is gone."""

from __future__ import annotations

import io
import os
import pty
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from armor_recipes.cli.streams import flush, patient_output
from armor_recipes.errors import ResourceError
from armor_recipes.integrations.transformers import load
from tests.support.commands import LISTEN, START, finished, forked, surroundings, write_recipe
from tests.support.engine import ARMOR
from tests.support.forks import Forks

FULL = Path("/dev/full")


@contextmanager
def standard(name: str, descriptor: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> Iterator[None]:
    """Standard output or error on a descriptor, as the interpreter opens them."""
    # What the guard left unwritten would raise as the stream is closed, as at the end of the interpreter.
    with open(descriptor, "w", **options) as stream, monkeypatch.context() as patch:  # type: ignore[call-overload]
        patch.setattr(sys, name, stream)
        yield


def broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("buffering", [-1, 1])
def test_what_nobody_reads_is_dropped(name: str, buffering: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with standard(name, broken_pipe(), monkeypatch, buffering=buffering), patient_output():
        for _ in range(3):
            print("x" * 10_000, file=getattr(sys, name))
            Console(stderr=name == "stderr").print("y")  # rich makes a SystemExit of a BrokenPipeError
            os.write(getattr(sys, name).fileno(), b"compiled code")
        flush(getattr(sys, name))


def test_unbuffered_output_is_dropped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.FileIO(broken_pipe(), "w")
    with io.TextIOWrapper(raw, write_through=True) as stream, monkeypatch.context() as patch:  # type: ignore[arg-type, unused-ignore]
        patch.setattr(sys, "stdout", stream)
        with patient_output():
            print("x")


def test_results_that_cannot_be_written_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with standard("stdout", os.open(FULL, os.O_WRONLY), monkeypatch), patient_output():
        print("result")
        with pytest.raises(ResourceError, match="results cannot be written to standard output: No space left"):
            flush(sys.stdout)
        flush(sys.stdout)


def test_progress_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with standard("stderr", os.open(FULL, os.O_WRONLY), monkeypatch), patient_output():
        print("progress", file=sys.stderr, flush=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_cannot_be_encoded_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    with standard("stdout", file, monkeypatch, encoding=encoding), patient_output():
        assert sys.stdout.encoding == encoding
        print("ö☃\udcff")
        Console().print("ö☃")
    read = (tmp_path / "out").read_text(encoding)
    assert (
        read.splitlines()
        == {
            "ascii": [r"\xf6\u2603\udcff", r"\xf6\u2603"],
            "latin-1": [r"ö\u2603\udcff", r"ö\u2603"],
            "utf-8": [r"ö☃\udcff", "ö☃"],
        }[encoding]
    )


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    found: list[bytes] = []

    def read() -> None:
        with open(reader, "rb") as stream:  # noqa: PTH123 - a descriptor
            found.append(stream.read())

    thread = threading.Thread(target=read)
    with standard("stdout", writer, monkeypatch), patient_output():
        threading.Timer(0.2, thread.start).start()
        print("x" * 1_000_000)
    thread.join(20)
    assert found == [b"x" * 1_000_000 + b"\n"]


def test_streams_are_put_back_and_those_in_memory_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with patient_output():
        assert (sys.stdout, sys.stderr) == before
        print("seen")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "seen\n"


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command line of a POSIX shell; `armor-apply` in it is ours."""
    start = shlex.join([sys.executable, "-c", START["armor-apply"]])
    return subprocess.run(
        ["bash", "-c", "set -o pipefail; " + command.replace("armor-apply", start)],
        cwd=cwd,
        env=surroundings(),
        capture_output=True,
        timeout=120,
        check=False,
    )


def whole(tmp_path: Path) -> bool:
    """The run wrote all, and nothing else."""
    assert load(tmp_path / "out")
    return sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_a_run_goes_on_without_streams(llama: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, llama)
    done = shell("armor-apply recipe.yaml >&- 2>&- <&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert whole(tmp_path)


def test_a_run_goes_on_without_its_reader(llama: Path, tmp_path: Path, forks: Forks) -> None:
    """As in `armor-apply recipe.yaml 2>&1 | head -1`."""
    reader, writer = os.pipe()
    file = write_recipe(tmp_path, llama)
    with forked(forks, "armor-apply", file, cwd=tmp_path, streams={1: writer, 2: writer}) as running:
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as lines:
            assert lines.readline()
        assert running.wait() == 0
    assert whole(tmp_path)


def test_a_full_disk_behind_a_stream_is_told(llama: Path, tmp_path: Path, forks: Forks) -> None:
    file = write_recipe(tmp_path, llama)
    with FULL.open("w") as full:
        done = finished(forked(forks, "armor-apply", file, "--json", cwd=tmp_path, streams={1: full.fileno()}))
    assert done.code == 7
    assert "error: results cannot be written" in done.err
    assert "Traceback" not in done.err
    assert whole(tmp_path)


def test_a_plan_on_an_ascii_terminal(llama: Path, tmp_path: Path, forks: Forks) -> None:
    command = ["armor-apply", write_recipe(tmp_path, llama), "--plan", "--output", "ö☃"]
    done = finished(forked(forks, *command, cwd=tmp_path, PYTHONIOENCODING="ascii"))
    assert (done.code, done.err) == (0, "")
    assert r"\xf6\u2603" in done.out


LONG = {**ARMOR, "iterations": 10**7, "targets": [r"re:.*layers\.1\..*q_proj$"], "solver": "adam"}


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed(llama: Path, tmp_path: Path, forks: Forks, ignored: bool) -> None:
    """It ends a run, unless the signal is ignored (`nohup`, `disown`): then what is printed has nowhere to go, and no more."""
    file = write_recipe(tmp_path, llama, **({} if ignored else {"ARMORModifier": LONG}))
    master, slave = pty.openpty()
    # The first terminal that the leader of a session opens is the one that it is told the end of.
    prelude = "import os; os.setsid(); os.open(os.ttyname(0), os.O_RDWR); "
    prelude += LISTEN + ("signal.signal(signal.SIGHUP, signal.SIG_IGN); " if ignored else "")
    running = forks.start(
        prelude + START["armor-apply"].removeprefix(LISTEN),
        file,
        folder=tmp_path,
        environment={**surroundings(), "TERM": "xterm"},
        streams=dict.fromkeys(range(3), slave),
    )
    os.close(slave)
    with running:
        read = b""
        while (b"all" if ignored else b"layer 2/2") not in read:  # the view, which may be drawn once in a short run
            read += os.read(master, 4096)
        os.close(master)
        assert running.wait() == (0 if ignored else 129)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out" if ignored else ".out.journal", "recipe.yaml"]
