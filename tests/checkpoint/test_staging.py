"""An output folder is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from armor_recipes.checkpoint import staging
from armor_recipes.checkpoint.staging import check_destination, recover, staged
from armor_recipes.errors import RecipeError, ResourceError

ROOT = Path(__file__).parents[2]
#: A file below another folder of the model.
WEIGHTS = Path("additional_chat_templates") / "rag.jinja"


def write(path: Path, content: str, *, overwrite: bool = False) -> None:
    with staged(path, overwrite=overwrite) as folder:
        (folder / "additional_chat_templates").mkdir()
        (folder / WEIGHTS).write_text(content)
        (folder / "config.json").write_text(json.dumps({"model_type": content}))


def read(path: Path) -> tuple[str, str]:
    return json.loads((path / "config.json").read_text())["model_type"], (path / WEIGHTS).read_text()


def neighbours(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


def test_new_and_replaced(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    write(out, "one")
    assert read(out) == ("one", "one")
    write(out, "two", overwrite=True)
    assert read(out) == ("two", "two")
    assert neighbours(out) == []
    assert out.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_existing_output_is_kept_without_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "model"
    write(out, "one")
    with pytest.raises(RecipeError, match=r"exists: pass --overwrite"):
        write(out, "two")
    assert read(out) == ("one", "one")


def test_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_text("meow")
    with pytest.raises(RecipeError, match="is no model"):
        write(out, "one", overwrite=True)
    assert (out / "cat.jpg").read_text() == "meow"
    with pytest.raises(RecipeError, match="not a folder"):
        write(out / "cat.jpg", "one", overwrite=True)
    with pytest.raises(RecipeError, match="root of the file system"):
        check_destination(Path("/"), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_another_users_folder_where_only_owners_may_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", "one")
    tmp_path.chmod(0o1777)
    check_destination(tmp_path / "model", overwrite=True)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RecipeError, match="belongs to another user"):
        check_destination(tmp_path / "model", overwrite=True)
    tmp_path.chmod(0o777)
    check_destination(tmp_path / "model", overwrite=True)


def test_the_root_of_a_file_system_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mounted"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match=r"root of a mounted file system.*name a folder inside it"):
            check_destination(out, overwrite=overwrite)
    check_destination(out / "model", overwrite=False)


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    write(out, "one")
    assert read(out) == ("one", "one")


def test_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real" / "model", "one")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "model")
    write(link, "two", overwrite=True)
    assert link.is_symlink()
    assert read(tmp_path / "real" / "model") == ("two", "two")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_what_was_there(tmp_path: Path, error: BaseException, exists: bool) -> None:
    out = tmp_path / "model"
    if exists:
        write(out, "one")

    def fail() -> None:
        with staged(out, overwrite=True) as folder:
            (folder / "config.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert out.exists() == exists
    assert not exists or read(out) == ("one", "one")
    assert neighbours(out) == []


def test_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def too_late() -> None:
        with staged(out, overwrite=False) as folder:
            (folder / "config.json").write_text("late")
            out.mkdir()
            (out / "config.json").write_text("first")

    with pytest.raises(RecipeError, match=r"exists.*kept in .*model\.unverified$"):
        too_late()
    assert (out / "config.json").read_text() == "first"
    assert neighbours(out) == ["model.unverified"]
    assert (tmp_path / "model.unverified" / "config.json").read_text() == "late"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("I/O error: ... (os error 28)")]
)
def test_full_disk(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ResourceError, match=r"no space left while writing .*model"),
        staged(tmp_path / "model", overwrite=False),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["exchange", "two steps"])
def test_replacing_without_exchange(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "two steps":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    out = tmp_path / "model"
    write(out, "one")
    write(out, "two", overwrite=True)
    assert read(out) == ("two", "two")
    assert neighbours(out) == []


def test_failing_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    write(out, "one")
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    rename = Path.rename

    def fail_for_staging(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_staging)
    with pytest.raises(RecipeError, match=r"cannot be put in place \(I/O error\): choose another path") as raised:
        write(out, "two", overwrite=True)
    assert read(out) == ("one", "one")
    (kept,) = neighbours(out)  # which could not be renamed either
    assert read(tmp_path / kept) == ("two", "two")
    assert str(tmp_path / kept) in str(raised.value)
    assert "move that away before the next run" in str(raised.value)


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
CRASHES = {
    "while writing": ("", "DIE()", "one"),
    "before the exchange": ("staging._exchange = lambda a, b: DIE()", "", "one"),
    "after the exchange": (
        "swap = staging._exchange\nstaging._exchange = lambda a, b: (swap(a, b), DIE())",
        "",
        "two",
    ),
    "while the old one is removed": ("staging.shutil.rmtree = lambda *a, **k: DIE()", "", "two"),
    "between two renames": (
        "staging._exchange = lambda a, b: False\nold = Path.rename\n"
        "Path.rename = lambda self, to: DIE() if '.tmp-' in self.name else old(self, to)",
        "",
        None,
    ),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_killed_process(tmp_path: Path, crash: str) -> None:
    patch, inside, expected = CRASHES[crash]
    out = tmp_path / "model"
    write(out, "one")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from armor_recipes.checkpoint import staging
        def DIE(): os.kill(os.getpid(), signal.SIGKILL)
        {patch}
        with staging.staged(Path(sys.argv[1]), overwrite=True) as folder:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "rag.jinja").write_text("two")
            {inside}
            (folder / "config.json").write_text('{{"model_type": "two"}}')
        """
    ).format(patch=patch, inside=inside)
    died = subprocess.run([sys.executable, "-c", script, str(out)], cwd=ROOT, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert neighbours(out), "the crash came too late to leave anything behind: it tested nothing"

    if expected is None:
        assert not out.exists()
    else:
        assert read(out) == (expected, expected)
    recover(out)
    assert read(out) == (expected or "one",) * 2
    assert neighbours(out) == []


def test_living_and_foreign_owners_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "model"
    alive = tmp_path / f".model.tmp-{staging._host()}-{os.getpid()}-0123abcd"
    foreign = tmp_path / ".model.tmp-another_host-1-0123abcd"
    other_output = tmp_path / f".model2.tmp-{staging._host()}-999999999-0123abcd"
    for folder in (alive, foreign, other_output):
        folder.mkdir()
    write(out, "one")
    assert neighbours(out) == sorted([alive.name, foreign.name, other_output.name])
