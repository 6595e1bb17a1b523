"""Files that appear whole or not at all; hashes that follow the content."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import platform
import signal
import threading
import time
from pathlib import Path

import pytest

from dmoe_var import files
from dmoe_var.experiment.record import Record
from dmoe_var.files import alone, sha256_of, sha256_of_all, whole_file, write_text

HOUR = 3600


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    return path


def record(note):
    return Record(
        stage="train_var", variant="default", fingerprint="f", metrics={"loss": 1.0},
        config={"note": note}, seed=0, num_samples=0, dtype="float32", started="s", ended="e",
        device="cpu", threads=1, git_commit="unknown", libraries={},
    )  # fmt: skip


# Whole or not at all


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "file.bin"
    with whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across file systems would copy
    assert os.listdir(tmp_path) == ["file.bin"]
    assert path.read_bytes() == b"half"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_no_temporary_one(old_file, error):
    def write():
        with whole_file(old_file) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert old_file.read_text() == "old"
    assert os.listdir(old_file.parent) == ["file.txt"]


def test_a_block_that_writes_nothing_is_an_error(old_file):
    with pytest.raises(OSError, match=r"file\.txt"), whole_file(old_file):
        pass
    assert old_file.read_text() == "old"


def test_what_cannot_be_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as caught:
        write_text(tmp_path / "folder", "text")
    assert caught.value.filename == str(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("size", [0, 9999])
def test_a_full_disk(old_file, full_disk, size):
    """Whatever part of 10,000 bytes fits: the error names the file, in one line, and its reason."""
    with full_disk(size), pytest.raises(OSError, match="too large") as caught:
        write_text(old_file, "x" * 10_000)
    assert caught.value.filename == str(old_file)
    assert "\n" not in str(caught.value)
    assert old_file.read_text() == "old"
    assert os.listdir(old_file.parent) == ["file.txt"]
    write_text(old_file, "new")
    assert old_file.read_text() == "new"


def test_a_record_on_a_full_disk(tmp_path, full_disk):
    record("old").write(tmp_path)
    with full_disk(100), pytest.raises(OSError, match="too large") as caught:
        record("new").write(tmp_path)
    assert caught.value.filename == str(tmp_path / "result.json")
    assert Record.read(tmp_path / "result.json").config == {"note": "old"}
    assert os.listdir(tmp_path) == ["result.json"]


def test_an_error_of_another_file_names_that_file(tmp_path):
    """What fails while a file is being written need not be the writing."""
    missing = tmp_path / "missing.png"

    def write():
        with whole_file(tmp_path / "out.bin") as temporary:
            temporary.write_bytes(b"half")
            missing.read_bytes()

    with pytest.raises(FileNotFoundError) as caught:
        write()
    assert caught.value.filename == str(missing)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("refuses", [None, errno.EINVAL])
def test_the_content_is_on_the_disk_before_the_name(old_file, monkeypatch, refuses):
    """Else a crash of the machine leaves an empty file. Some file systems cannot be waited for."""
    events, replace = [], os.replace

    def fsync(descriptor):
        events.append(os.pread(descriptor, 100, 0))
        if refuses is not None:
            raise OSError(refuses, "not here")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("named") or replace(*paths))
    write_text(old_file, "new")
    assert events == [b"new", "named"]
    assert old_file.read_text() == "new"


def test_a_disk_that_fails_at_last(old_file, monkeypatch):
    """A quota over the network shows when the content is waited for."""

    def fsync(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="quota") as caught:
        write_text(old_file, "new")
    assert caught.value.filename == str(old_file)
    assert old_file.read_text() == "old"
    assert os.listdir(old_file.parent) == ["file.txt"]


def test_two_writers_of_one_process(old_file):
    """Each has a temporary file of its own; the later one's content stays."""
    with whole_file(old_file) as first:
        first.write_text("first")
        with whole_file(old_file) as second:
            second.write_text("second")
        assert old_file.read_text() == "second"
    assert old_file.read_text() == "first"
    assert os.listdir(old_file.parent) == ["file.txt"]


# One at a time

FORK = multiprocessing.get_context("fork")


def take(folder, then):
    with alone(folder):
        then()


def until(condition):
    """Waits for it, at most ten seconds."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_another_process_is_waited_for(tmp_path, capfd):
    """It says which, and where; the lock leaves nothing."""
    folder, said, got = tmp_path / "folder", [], tmp_path / "got"
    folder.mkdir()
    with alone(folder):
        other = FORK.Process(target=take, args=(folder, got.touch))
        other.start()
        until(lambda: said.append(capfd.readouterr().err) or any(said))
        assert not got.exists()
    other.join()
    said.append(capfd.readouterr().err)
    assert got.exists()
    owner = f"process {os.getpid()} on {platform.node()}"
    assert "".join(said) == f"waiting for another run ({owner}), at {folder}\n"
    assert os.listdir(folder) == []


def test_a_killed_process_lets_go(tmp_path):
    other = FORK.Process(target=take, args=(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    other.start()
    other.join()
    assert os.listdir(tmp_path) == [".lock"]
    with alone(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def count_up(folder, times):
    for _ in range(times):
        with alone(folder):
            number = int((folder / "number").read_text())
            (folder / "number").write_text(str(number + 1))


@pytest.mark.parametrize("kind", [FORK.Process, threading.Thread])
def test_many_at_once_take_turns(tmp_path, kind):
    """Who waited for a lock file that is gone does not think that it holds the new one."""
    (tmp_path / "number").write_text("0")
    others = [kind(target=count_up, args=(tmp_path, 8)) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert (tmp_path / "number").read_text() == "32"
    assert os.listdir(tmp_path) == ["number"]


def is_held(folder):
    with open(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_holder_may_ask_again(tmp_path):
    with alone(tmp_path):
        with alone(tmp_path):
            assert is_held(tmp_path)
        assert is_held(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_child_does_not_keep_what_its_parent_let_go(tmp_path):
    """Workers that are forked meanwhile inherit the open file."""
    with alone(tmp_path):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
        late = FORK.Process(target=take, args=(tmp_path, (tmp_path / "got").touch))
        late.start()
        time.sleep(0.2)
    try:
        until((tmp_path / "got").exists)
    finally:
        child.kill()
    late.join()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """Work goes on, and one line says what is missing."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with alone(tmp_path):
            pass
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: its file system has no locks (none)")
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_lock_that_fails_otherwise(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output") as caught, alone(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path / ".lock")


def test_a_folder_that_is_only_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with alone(tmp_path):
        assert os.listdir(tmp_path) == []


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    """And made again by another, who holds it now."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with alone(folder):
        (folder / ".lock").unlink()
        folder.rmdir()
        folder.mkdir()
        (folder / ".lock").touch()
    assert os.listdir(folder) == [".lock"]


# Temporary files of others


def leftover(path, age, owner="another-machine-17"):
    """A temporary file of another process, last written `age` seconds ago."""
    temporary = path.with_name(f".{path.name}.{owner}.3.tmp")
    temporary.write_text("half")
    os.utime(temporary, (temporary.stat().st_mtime - age,) * 2)
    return temporary


def test_a_killed_process_of_this_machine_leaves_nothing(old_file):
    child = FORK.Process(target=int)
    child.start()
    child.join()
    leftover(old_file, 0, f"{platform.node()}-{child.pid}")
    leftover(old_file, 0, f"{platform.node()}-{2**31}")  # no process has this number
    running = leftover(old_file, 0, f"{platform.node()}-{os.getppid()}")
    write_text(old_file, "new")
    assert sorted(os.listdir(old_file.parent)) == [running.name, "file.txt"]


@pytest.mark.parametrize(("age", "stays"), [(0, True), (HOUR - 60, True), (HOUR + 60, False)])
def test_another_machine_s_temporary_file_goes_when_it_is_old(old_file, age, stays):
    temporary = leftover(old_file, age)
    write_text(old_file, "new")
    assert temporary.exists() == stays


@pytest.mark.parametrize(
    "name", [".other.txt.another-1.tmp", ".file.txt", "file.txt.another-1.tmp", ".file.txt.tmp.x"]
)
def test_other_files_stay(old_file, name):
    other = old_file.with_name(name)
    other.write_text("mine")
    os.utime(other, (0, 0))
    write_text(old_file, "new")
    assert other.read_text() == "mine"


def test_a_name_with_wildcards_is_only_itself(tmp_path):
    kept = leftover(tmp_path / "a1.txt", 2 * HOUR)
    write_text(tmp_path / "a[1].txt", "new")
    assert kept.exists()


def test_a_leftover_that_is_gone_does_not_stop_a_write(old_file):
    """As where another process was first."""
    old_file.with_name(".file.txt.another-2.tmp").symlink_to(old_file.parent / "nowhere")
    write_text(old_file, "new")
    assert old_file.read_text() == "new"


def test_readers_never_see_half_a_file(tmp_path):
    """While one thread replaces a file many times, every read gives one of the whole texts."""
    path, texts = tmp_path / "file.txt", {"a" * 100_000, "b" * 200_000}
    write_text(path, "a" * 100_000)

    def write():
        for text in [*texts] * 40:
            write_text(path, text)

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_text()}
    while writer.is_alive():
        seen.add(path.read_text())
    writer.join()
    assert seen <= texts


# Hashes


@pytest.mark.parametrize("size", [0, 1, files.CHUNK, files.CHUNK + 1])
def test_sha256_of_any_size(tmp_path, size):
    path, content = tmp_path / "file.bin", os.urandom(1024) * (size // 1024 + 1)
    path.write_bytes(content[:size])
    assert sha256_of(path) == hashlib.sha256(content[:size]).hexdigest()


def test_sha256_is_computed_once(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    path.write_bytes(b"content")
    first, read = sha256_of(path), []
    monkeypatch.setattr(Path, "open", lambda *_: read.append(1))
    (tmp_path / "link").symlink_to(path)
    assert sha256_of(path) == sha256_of(tmp_path / "link") == first
    assert read == []


def test_sha256_follows_a_change(tmp_path):
    path = tmp_path / "file.bin"
    found = []
    for content in (b"one", b"three", b"six"):
        write_text(path, content.decode())
        os.utime(path, ns=(0, len(found)))  # "one" and "six": the same size, another time
        found.append(sha256_of(path))
        assert found[-1] == hashlib.sha256(content).hexdigest()


def test_sha256_follows_a_file_put_in_place_with_its_old_time(tmp_path):
    """As rsync --times and cp --preserve leave it: the same size and time, other content."""
    path, other = tmp_path / "file.bin", tmp_path / "other.bin"
    for each, content in ((path, b"one"), (other, b"two")):
        each.write_bytes(content)
        os.utime(each, ns=(0, 10**18))
    before = sha256_of(path)
    os.replace(other, path)
    assert sha256_of(path) == hashlib.sha256(b"two").hexdigest() != before


# Hashes of many files


@pytest.fixture
def many(tmp_path, monkeypatch):
    """many(names=None) -> hashes of a folder's files, kept in another folder; `many.read` says
    which files were read since it was last cleared."""
    monkeypatch.setattr(files, "SETTLED_NS", -(10**12))  # what is new is kept too
    monkeypatch.setattr(files, "HASHED_AT_ONCE", 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.bin").write_bytes(bytes([number]) * 5)
    sha256 = files._sha256

    def counted(path):
        many.read.append(path.name)
        return sha256(path)

    def many(names=None, hashes=tmp_path / "new"):
        return sha256_of_all(folder, names or sorted(os.listdir(folder)), hashes)

    monkeypatch.setattr(files, "_sha256", counted)
    many.read, many.folder, many.hashes = [], folder, tmp_path / "new"
    return many


def of_content(folder, names):
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def test_many_hashes_are_those_of_the_files(many):
    names = ["6.bin", "0.bin", "3.bin", "0.bin"]
    assert many(names) == of_content(many.folder, names)
    assert many() == of_content(many.folder, sorted(os.listdir(many.folder)))
    assert many(["none.bin", "1.bin"]) == ["", *of_content(many.folder, ["1.bin"])]
    assert many(["1.bin"], None) == of_content(many.folder, ["1.bin"])


def test_only_what_has_changed_is_read_again(many):
    """Its size and its time of writing are what they were."""
    whole = many()
    many.read.clear()
    assert many() == whole
    assert many.read == []
    path, times = many.folder / "3.bin", (many.folder / "3.bin").stat()
    time.sleep(0.05)
    path.write_bytes(b"other")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert many() == of_content(many.folder, sorted(os.listdir(many.folder))) != whole
    assert many.read == ["3.bin"]


def test_what_has_just_been_written_is_read_again(many, monkeypatch):
    """A change within a tick of the file system's clock would not show."""
    monkeypatch.setattr(files, "SETTLED_NS", 10**12)
    many()
    many()
    assert many.read.count("3.bin") == 2


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "dmoe-var-hashes/1"}', '{"3.bin": "1 1 1 1 0"}']
)
def test_a_broken_ledger_is_made_again(many, content):
    whole = many()
    (ledger,) = many.hashes.iterdir()
    ledger.write_text(content)
    many.read.clear()
    assert many() == whole
    assert len(many.read) == 7
    many.read.clear()
    assert many() == whole
    assert many.read == []


def test_a_part_leaves_the_rest_in_the_ledger(many):
    many()
    (many.folder / "9.bin").write_bytes(b"new")
    many(["9.bin"])
    many.read.clear()
    many()
    assert many.read == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EMFILE, "too many")])
def test_an_interrupted_call_keeps_what_it_has_hashed(many, monkeypatch, error):
    """An error of the machine is none of the file: it is not taken for unreadable."""
    counted = files._sha256

    def fail(path):
        if path.name == "6.bin":
            time.sleep(0.2)
            raise error
        return counted(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_sha256", fail)
        with pytest.raises(type(error)):
            many()
    many.read.clear()
    many()
    assert many.read == ["6.bin"]
