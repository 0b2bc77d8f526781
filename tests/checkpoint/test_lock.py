"""One run on an output at a time, whoever begins and ends when, and however."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from armor_recipes.checkpoint import lock
from armor_recipes.checkpoint.lock import host, lock_file, locked
from armor_recipes.errors import LockedError, RecipeError
from armor_recipes.events import Event, PhaseStarted
from armor_recipes.run import apply
from tests.support.engine import recipe

ROOT = Path(__file__).parents[2]


def refused(path: Path) -> str:
    with pytest.raises(LockedError) as raised, locked(path):
        raise AssertionError("two hold it")
    return str(raised.value)


def test_the_second_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "model"
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    with locked(out):
        assert f"(process {os.getpid()} on {host()}, since 20" in refused(tmp_path / "link" / "er" / "model")
        with locked(out.with_name("model2")):
            assert sorted(path.name for path in out.parent.iterdir()) == [".model.lock", ".model2.lock"]
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    with pytest.raises(ValueError, match="boom"), locked(out):
        raise ValueError("boom")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_two_runs_in_one_process(llama: Path, tmp_path: Path) -> None:
    """The second begins while the first is in the middle of it, in a thread of its own."""
    found: list[BaseException] = []

    def second() -> None:
        try:
            apply(recipe(llama, tmp_path / "out"))
        except LockedError as error:
            found.append(error)

    def observe(event: Event) -> None:
        if event == PhaseStarted("compress"):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    apply(recipe(llama, tmp_path / "out"), observer=observe)
    assert len(found) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_never_two_at_once_though_the_file_comes_and_goes(tmp_path: Path) -> None:
    inside, most, done = [0], [0], [0]
    until = time.monotonic() + 1.0

    def work() -> None:
        while time.monotonic() < until:
            try:
                with locked(tmp_path / "new" / "model"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0)
                    inside[0] -= 1
                    done[0] += 1
            except LockedError:
                continue

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside[0], most[0]) == (0, 1)
    assert done[0] > 20


def test_a_folder_that_goes_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run made it, and ends between the kernel's "it exists" and the look at it."""
    make, left = Path.mkdir, [3]

    def mkdir(self: Path, *args: int, **kwargs: bool) -> None:
        if left[0]:
            left[0] -= 1
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with locked(tmp_path / "new" / "model"):
        assert lock_file(tmp_path / "new" / "model").exists()
    assert (left[0], list(tmp_path.iterdir())) == (0, [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_another_run_and_keeps_nobody_out(tmp_path: Path) -> None:
    script = """
        import os, sys, time
        from pathlib import Path
        from armor_recipes.checkpoint.lock import locked
        from armor_recipes.errors import LockedError
        out = Path(sys.argv[1])
        with locked(out):
            child = os.fork()
            if not child:
                try:
                    with locked(out):
                        os._exit(1)
                except LockedError:
                    os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        lasting = locked(out)
        lasting.__enter__()
        child = os.fork()
        if not child:
            lasting.__exit__(None, None, None)  # as an exception that unwinds the child would
            assert out.with_name(".model.lock").exists()
            time.sleep(60)
        time.sleep(0.2)
        lasting.__exit__(None, None, None)
        with locked(out):  # the child has the old file open, still
            pass
        os.kill(child, 9)
        os.waitpid(child, 0)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path / "model")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    out = tmp_path / "model"
    file = lock_file(out)
    with locked(out):
        said = refused(out)
        assert f"process {os.getpid()} on {host()}" in said
        assert f"(the file system has no locks: if you know that the run has ended, remove {file})" in said
    assert list(tmp_path.iterdir()) == []
    ended = subprocess.Popen(["true"])
    ended.wait()
    file.write_text(json.dumps({"process": ended.pid, "host": host(), "since": "once"}))
    with locked(out):
        assert json.loads(file.read_text())["process"] == os.getpid()
    file.write_text(json.dumps({"process": ended.pid, "host": "elsewhere", "since": "once"}))
    assert f"process {ended.pid} on elsewhere, since once" in refused(out)
    file.write_text("no JSON")  # half-written by one who died in it
    with locked(out):
        pass


def test_what_a_lock_cannot_be_made_of_is_told(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    lock_file(tmp_path / "model").symlink_to(tmp_path / "precious")
    with pytest.raises(RecipeError, match=r"cannot be locked \(.*\.model\.lock: "), locked(tmp_path / "model"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
    with pytest.raises(RecipeError, match="cannot be locked"), locked(tmp_path / "precious" / "model"):
        pass


def test_a_disk_that_is_full_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "_sign", full)
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "deep" / "model"):
        pass
    assert list(tmp_path.iterdir()) == []
