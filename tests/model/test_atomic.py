"""Files, folders and symlinks appear complete or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model import atomic
from model.atomic import (
    new_file,
    new_files,
    new_folder,
    owner_only,
    remove_folder,
    remove_leftovers,
    replace_file,
    replace_folder,
    replace_symlink,
    shared_temporary_path,
    temporary_file,
)
from model.errors import UserError

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_new_file_appears_at_the_end_of_the_block(tmp_path):
    target = tmp_path / "a.jsonl"
    target.write_text("old")
    with new_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and names(tmp_path) == {"a.jsonl"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_exception_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.jsonl"
    target.write_text("old")
    with pytest.raises(error), new_file(target) as temporary:
        temporary.write_text("new")
        raise error
    assert target.read_text() == "old" and names(tmp_path) == {"a.jsonl"}


def test_killed_process_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.jsonl"
    target.write_text("old")
    code = f"""
import os, signal
from pathlib import Path
from model.atomic import new_file
with new_file(Path({str(target)!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode < 0
    assert target.read_text() == "old"
    assert not [path for path in tmp_path.glob("*.jsonl") if path != target], "no data folder search may find it"


def test_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr(atomic.os, "replace", lambda source, target: calls.append("replace"))
    with new_file(tmp_path / "a") as temporary:
        temporary.touch()
    assert calls == ["fsync", "replace"]


def test_new_file_has_the_permissions_of_a_plain_write(tmp_path):
    (tmp_path / "plain").touch()
    with new_file(tmp_path / "atomic") as temporary:
        temporary.touch()
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_temporary_file_is_removed_unless_renamed(tmp_path):
    with temporary_file(tmp_path / "a") as temporary:
        temporary.write_text("unwanted")
    assert not names(tmp_path)
    with temporary_file(tmp_path / "a") as temporary:
        temporary.write_text("wanted")
        replace_file(temporary, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "wanted"


def test_new_files_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(OSError), new_files(paths) as temporaries:
        temporaries[paths[0]].touch()  # the second is never written
    assert not names(tmp_path)
    with new_files(paths) as temporaries:
        for path in paths:
            temporaries[path].touch()
        assert not set(paths) & set(tmp_path.iterdir())
    assert names(tmp_path) == {"a", "b"}


def test_new_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not names(target.parent)
    target.mkdir()  # an empty folder may be filled
    with new_folder(target) as folder:
        (folder / "file").touch()
        assert not names(target)
    assert names(target.parent) == {"model"} and names(target) == {"file"}
    with pytest.raises(UserError, match="already exists and is not an empty folder"), new_folder(target):
        pass


def test_new_folder_reports_a_refusal_of_the_operating_system(tmp_path):
    with pytest.raises(UserError, match="model could not be written: disk full"), new_folder(tmp_path / "model"):
        raise OSError(28, "disk full")
    assert not names(tmp_path)


def test_replace_folder_replaces_an_existing_one(tmp_path):
    target = tmp_path / "checkpoint"
    temporary = shared_temporary_path(target)
    for folder, name in ((target, "old"), (temporary, "new")):
        folder.mkdir()
        (folder / name).touch()
    replace_folder(temporary, target)
    assert names(tmp_path) == {"checkpoint"} and names(target) == {"new"}


def test_removing_a_missing_folder_does_nothing(tmp_path):
    remove_folder(tmp_path / "missing")
    assert not names(tmp_path)


def test_symlink_is_replaced(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        replace_symlink(tmp_path / "last", name)
        assert os.readlink(tmp_path / "last") == name
    assert names(tmp_path) == {"one", "two", "last"}


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "tmp.last").symlink_to("checkpoint")
    (tmp_path / "tmp.checkpoint").mkdir()
    (tmp_path / "tmp.checkpoint" / "half").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"checkpoint"}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_new_files_can_be_read_by_their_owner_only_from_the_start(tmp_path):
    targets = [tmp_path / "a", tmp_path / "b"]
    with new_files(targets) as temporaries:
        for temporary in temporaries.values():
            temporary.write_text("note")
            assert mode(temporary) == 0o600
    with new_file(tmp_path / "c", private=True) as temporary:
        temporary.write_text("note")
    with open(tmp_path / "d", "a", opener=owner_only) as file:
        file.write("note")
    assert [mode(tmp_path / name) for name in "abcd"] == [0o600] * 4


@pytest.mark.parametrize("permissions", [0o644, 0o640, 0o600, 0o400])
def test_replaced_file_keeps_its_permissions(tmp_path, permissions):
    target = tmp_path / "a"
    for write in (lambda: new_file(target), lambda: new_file(target, private=True), lambda: new_files([target])):
        target.unlink(missing_ok=True)
        target.write_text("old")
        target.chmod(permissions)
        with write() as temporary:
            temporary = temporary if isinstance(temporary, Path) else temporary[target]
            temporary.write_text("new")
            assert mode(temporary) == 0o600
        assert target.read_text() == "new" and mode(target) == permissions


def test_shared_temporary_of_another_run_has_another_name(tmp_path):
    names = {shared_temporary_path(tmp_path / "checkpoint_000100", owner).name for owner in ("", "a", "b")}
    assert names == {"tmp.checkpoint_000100", "tmp.checkpoint_000100.a", "tmp.checkpoint_000100.b"}
    for name in names:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
