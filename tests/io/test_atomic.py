"""Atomic replacement of files, folders and links: complete or unchanged, whatever fails and whenever it is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest

from mmx.io.atomic import (
    atomic_symlink,
    atomic_text_writer,
    atomic_write,
    atomic_write_folder,
    atomic_write_text,
    folder_or_backup,
)


def fill(folder, text):
    (folder / "one.txt").write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "two.txt").write_text(text)


def write(folder, text):
    with atomic_write_folder(folder) as temporary:
        fill(temporary, text)


def content(folder):
    return {(folder / name).read_text() for name in ("one.txt", "inner/two.txt")}


def is_alone(path):
    return [other.name for other in path.parent.iterdir()] == [path.name]


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "deep" / "map.png"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".png" and not path.exists()
        temporary.write_text("one")
    assert path.read_text() == "one"
    with pytest.raises(OSError, match="full"), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("tw")
        raise OSError("the disk is full")
    assert path.read_text() == "one"
    assert is_alone(path)
    atomic_write_text(path, "drei é")
    assert path.read_text(encoding="utf-8") == "drei é"


def test_a_text_writer_follows_links_and_writes_to_pipes(tmp_path):
    path = tmp_path / "file"
    link = tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    with atomic_text_writer(link) as file:
        file.write("new \udcff")
        assert path.read_text() == "old"
    assert link.is_symlink()
    assert path.read_text() == "new \\udcff"
    with atomic_text_writer(type(path)(os.devnull)) as file:
        file.write("x")


def test_a_symlink_is_replaced_atomically(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        atomic_symlink(tmp_path / "link", tmp_path / name)
        assert (tmp_path / "link").resolve() == (tmp_path / name).resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_completely(tmp_path):
    folder = tmp_path / "deep" / "m"
    for text in ("old", "new"):
        write(folder, text)
        assert content(folder) == {text}
        assert is_alone(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_older_folder_and_nothing_else(tmp_path, error):
    write(tmp_path / "m", "old")
    for name in ("m", "fresh"):
        with pytest.raises(type(error)), atomic_write_folder(tmp_path / name) as temporary:  # noqa: PT012
            fill(temporary, "new")
            raise error
    assert content(tmp_path / "m") == {"old"}
    assert is_alone(tmp_path / "m")


@pytest.mark.parametrize("failing", ["backup", "temporary"])
def test_a_failing_rename_restores_the_older_folder(tmp_path, monkeypatch, failing):
    folder = tmp_path / "m"
    write(folder, "old")
    rename = os.rename
    fails = {"backup": lambda source: source == folder, "temporary": lambda source: source.suffix == ".tmp"}[failing]
    monkeypatch.setattr(os, "rename", lambda a, b: disk_full() if fails(a) else rename(a, b))
    with pytest.raises(OSError, match="No space"):
        write(folder, "new")
    monkeypatch.undo()
    assert content(folder) == {"old"}
    assert is_alone(folder)
    write(folder, "new")
    assert content(folder) == {"new"}
    assert is_alone(folder)


def test_the_backup_is_read_after_a_kill_between_two_renames(tmp_path):
    folder = tmp_path / "m"
    write(folder, "old")
    assert folder_or_backup(folder) == folder
    folder.rename(tmp_path / ".m.old")
    assert content(folder_or_backup(folder)) == {"old"}
    write(folder, "new")
    assert content(folder_or_backup(folder)) == {"new"}
    assert is_alone(folder)


def test_a_stale_backup_does_not_stop_the_next_write(tmp_path):
    """A process may be killed after both renames, before it removes the backup."""
    folder = tmp_path / "m"
    write(folder, "new")
    write(tmp_path / ".m.old", "old")
    assert content(folder_or_backup(folder)) == {"new"}
    write(folder, "newer")
    assert content(folder) == {"newer"}
    assert is_alone(folder)


def test_a_link_to_a_folder_is_followed(tmp_path):
    folder = tmp_path / "steps" / "7"
    write(folder, "old")
    (tmp_path / "best").symlink_to("steps/7")
    write(tmp_path / "best", "new")
    assert (tmp_path / "best").is_symlink()
    assert content(folder) == {"new"}


def test_temporaries_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".m.{pid}.tmp").mkdir()
    write(tmp_path / "m", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f".m.{os.getppid()}.tmp", "m"])


def write_forever(folder, first):
    for number in range(first, 10**6):
        write(folder, str(number))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_random_moments_a_complete_folder_is_always_found(tmp_path):
    folder = tmp_path / "m"
    write(folder, "0")
    rng = random.Random(0)
    newest = 0
    for _ in range(20):
        process = get_context("fork").Process(target=write_forever, args=(folder, newest + 1))
        process.start()
        time.sleep(rng.uniform(0.01, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was still writing"
        (text,) = content(folder_or_backup(folder))
        assert int(text) >= newest
        newest = int(text)
    assert newest > 10, "some writes were completed"
    write(folder, "last")
    assert is_alone(folder)
