"""C files compiled at first use: kept, made once, and one sentence where that cannot be."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

from dmoe_var import c_library
from dmoe_var.c_library import CannotCompileError, load, loaded

FORK = multiprocessing.get_context("fork")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMOE_VAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def libraries(cache):
    return sorted(path.name for path in cache.glob("*.so"))


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_compiled_once_for_each_content(cache, source, monkeypatch):
    assert load(source).answer() == 42
    (name,) = libraries(cache)
    assert name.startswith("answer-")
    with monkeypatch.context() as patch:
        patch.setattr(c_library, "_compile", lambda *given: pytest.fail("compiled again"))
        assert load(source).answer() == 42
    source.write_text("int answer(void) { return 43; }\n")
    assert load(source).answer() == 43
    assert len(libraries(cache)) == 2


@needs_compiler
def test_another_processor_or_compiler_has_its_own(cache, source, monkeypatch, tmp_path):
    load(source)
    monkeypatch.setattr(c_library, "processor", lambda: "another")
    load(source)
    monkeypatch.setenv("CC", script(tmp_path / "other", 'exec cc "$@"'))
    load(source)
    assert len(libraries(cache)) == 3


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_threads_are_torch_s_own(cache, tmp_path):
    """Not those of a second OpenMP library that the compiler brings."""
    before = set(openmp_libraries())
    source = tmp_path / "threads.c"
    source.write_text(
        "int threads(void) {\n int n = 0;\n#pragma omp parallel num_threads(2)\n"
        "#pragma omp atomic\n n++;\n return n;\n}\n"
    )
    assert load(source).threads() == 2
    assert set(openmp_libraries()) == before


def openmp_libraries():
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/" in line}
    return [path for path in paths if c_library.OPENMP.search(os.path.basename(path))]


def test_no_compiler(cache, source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotCompileError, match=r"^no C compiler: cc, gcc, clang is not there$"):
        load(source)
    monkeypatch.setenv("CC", "/nowhere/cc -O2")
    with pytest.raises(CannotCompileError, match=r"^no C compiler: /nowhere/cc -O2 is not there$"):
        load(source)
    monkeypatch.setenv("CC", "cc '")
    with pytest.raises(CannotCompileError, match=r"^No closing quotation$"):
        load(source)


def test_a_broken_compiler(cache, source, monkeypatch, tmp_path):
    """Its first words are told, and nothing is left behind."""
    says = 'case "$*" in *--version*) echo 1;; *) echo "no such header" >&2; exit 1;; esac'
    monkeypatch.setenv("CC", script(tmp_path / "broken", says))
    with pytest.raises(CannotCompileError, match=r"broken failed \(1\): no such header$"):
        load(source)
    assert libraries(cache) == []


def test_a_compiler_that_makes_nonsense(cache, source, monkeypatch, tmp_path):
    says = 'for last; do :; done; case "$*" in *--version*) echo 1;; *) echo x > "$last";; esac'
    monkeypatch.setenv("CC", script(tmp_path / "wrong", says))
    with pytest.raises(CannotCompileError):
        load(source)


@needs_compiler
def test_a_folder_that_cannot_be_made_or_written(source, monkeypatch):
    """Nobody, not even root, can write where the system shows its processes."""
    read_only = ["/proc/self"] if sys.platform == "linux" else []
    for folder in (str(source / "cache"), *read_only):
        monkeypatch.setenv("DMOE_VAR_CACHE", folder)
        with pytest.raises(CannotCompileError):
            load(source)


def test_the_reason_is_told_once(cache, source, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    for _ in range(2):
        assert loaded(source, str, "no kernel here") is None
    assert capfd.readouterr().err == (
        "no kernel here: no C compiler: cc, gcc, clang is not there\n"
    )


@needs_compiler
def test_a_library_without_the_function_is_none(cache, source, capfd):
    assert loaded(source, lambda library: library.other, "no kernel here") is None
    assert capfd.readouterr().err.startswith("no kernel here: ")


@needs_compiler
@pytest.mark.parametrize("damage", ["cut short", "zeroed", "empty", "untold"])
def test_a_damaged_library_is_made_again(cache, source, damage):
    """To load one that is cut short ends the process, so it is loaded in another."""
    made = Path(load(source)._name)
    content = made.read_bytes()
    half = len(content) // 2
    text = {
        "cut short": content[:half],
        "zeroed": content[:half] + bytes(len(content) - half),
        "empty": b"",
        "untold": content,
    }[damage]
    made.unlink()  # it is still loaded here
    made.write_bytes(text)
    if damage == "untold":
        made.with_suffix(".sha256").unlink()
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=answer, args=(source, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == 42
    process.join()
    assert len(libraries(cache)) == 1


@needs_compiler
def test_a_folder_by_a_bare_name(source, monkeypatch, tmp_path):
    """The loader would look a name without a slash up in the system's folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DMOE_VAR_CACHE", ".")
    assert load(source).answer() == 42


def answer(path, pipe):
    pipe.send(load(path).answer())


@needs_compiler
def test_processes_that_compile_at_once(cache, source, monkeypatch, tmp_path):
    """One compiles, all others wait for it."""
    count = tmp_path / "count"
    slow = f'case "$*" in *--version*) ;; *) echo x >> {count}; sleep 0.3;; esac; exec cc "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "slow", slow))
    pipes = []
    for _ in range(3):
        ours, theirs = FORK.Pipe()
        FORK.Process(target=answer, args=(source, theirs), daemon=True).start()
        pipes.append(ours)
    assert [pipe.recv() for pipe in pipes] == [42] * 3
    assert count.read_text().split() == ["x"] * 2  # to compile, and to link


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DMOE_VAR_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dmoe_var"),
        ({}, "/home/me/.cache/dmoe_var"),
    ],
)
def test_where_it_is_kept(monkeypatch, environment, folder):
    for name in ("DMOE_VAR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert str(c_library.cache_folder()) == folder


@pytest.fixture
def homeless(monkeypatch):
    for name in ("DMOE_VAR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])


def test_without_a_home(homeless, source):
    with pytest.raises(FileNotFoundError, match="no home folder, DMOE_VAR_CACHE may name another"):
        c_library.cache_folder()
    if shutil.which("cc"):
        with pytest.raises(CannotCompileError, match="no home folder"):
            load(source)
