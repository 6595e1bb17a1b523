"""Threads: as many as cores may be used, and asleep where there is nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmoe_var import threads

CORES = 8
V1 = "cpu,cpuacct"


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """cgroups(own, files): what /proc/self/cgroup says, and the files under /sys/fs/cgroup."""
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CORES)), raising=False)
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "own")

    def cgroups(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return cgroups


def v1(folder, quota, period=100_000):
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, CORES),
        ("0::/\n", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, CORES),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/../../job\n", {"job/cpu.max": "400000 100000\n"}, 4),
        (f"4:{V1}:/\n", v1(V1, -1), CORES),
        (f"4:{V1}:/docker/0a\n", v1(V1, 200_000), 2),
        (f"4:{V1}:/job/7\n", {**v1(f"{V1}/job/7", -1), **v1(f"{V1}/job", 100_000)}, 1),
        ("1:cpu:/\n0::/\n", v1("cpu", 50_000, 10_000), 5),
        ("5:cpuset:/x\n", {"cpuset/x/cpu.max": "100000 100000"}, CORES),
        ("1:cpu:/\n0::/a\n", {"unified/a/cpu.max": "100000 100000"}, 1),
    ],
)
def test_quotas(cgroups, own, files, cores):
    """Of a container or a job, by itself or within others; the lowest holds, rounded up."""
    cgroups(own, files)
    assert threads.usable_cores() == cores


def test_affinity(cgroups, monkeypatch):
    cgroups("0::/\n", {"cpu.max": "500000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert threads.usable_cores() == 3


def test_what_python_is_told(cgroups, monkeypatch):
    """From Python 3.13: -X cpu_count."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 2, raising=False)
    assert threads.usable_cores() == 2


def test_elsewhere_than_on_linux(cgroups, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.usable_cores() == 6


@pytest.mark.parametrize(
    ("cores", "environment", "expected"),
    [
        (2, {}, [2]),
        (2, {"OMP_NUM_THREADS": "4"}, []),
        (2, {"MKL_NUM_THREADS": "4"}, []),
        (4, {}, []),
    ],
)
def test_threads_are_no_more_than_cores(monkeypatch, cores, environment, expected):
    for name in threads.COUNTED_BY_USER:
        monkeypatch.setenv(name, environment.get(name, ""))
    found = []
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    threads.limit_threads()
    assert found == expected


@pytest.mark.parametrize("name", threads.SAID_BY_USER)
def test_what_the_user_says_of_waiting_holds(monkeypatch, name):
    given = {each: "7" if each == name else "" for each in threads.SAID_BY_USER}
    for each, value in given.items():
        monkeypatch.setenv(each, value)
    monkeypatch.setattr(threads, "limit_threads", lambda: None)
    monkeypatch.delitem(sys.modules, "torch")
    threads.settle_threads()
    assert {each: os.environ[each] for each in given} == given


def test_where_torch_is_loaded_nothing_changes(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(threads, "limit_threads", lambda: pytest.fail("threads were limited"))
    threads.settle_threads()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_library_settles_before_torch_is_there(tmp_path):
    """OpenMP reads its environment when torch loads, for which a file of that name stands here."""
    program = "import os; print(os.environ['GOMP_SPINCOUNT'], flush=True); os._exit(0)"
    (tmp_path / "torch.py").write_text(program)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    ours = (*threads.SAID_BY_USER, *threads.COUNTED_BY_USER)
    environment = {k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONPATH": path}
    command = [sys.executable, "-c", "import dmoe_var"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "3000\n"
