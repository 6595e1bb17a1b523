"""Threads: as many as cores may be used, and asleep where there is nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys

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
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, CORES),
        ("0::/\n", {"cpu.max": ""}, CORES),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 50000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/../../job\n", {"job/cpu.max": "400000 100000\n"}, 4),
        ("0::/host/place\n", {"cpu.max": "300000 100000\n"}, 3),
        (f"3:memory:/x\n4:{V1}:/\n", v1(V1, 250_000), 3),
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
        (2, {"OMP_NUM_THREADS": ""}, [2]),
        (2, {"OMP_NUM_THREADS": "4"}, []),
        (2, {"MKL_NUM_THREADS": "4"}, []),
        (4, {}, []),
        (9, {}, []),
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


def plain_environment(**more):
    ours = (*threads.SAID_BY_USER, *threads.COUNTED_BY_USER)
    return {**{k: v for k, v in os.environ.items() if k not in ours}, **more}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity is Linux's")
def test_a_fresh_process_on_one_core():
    """Importing the library is early enough for OpenMP, which itself says what it goes by."""
    core = min(os.sched_getaffinity(0))
    program = "import dmoe_var, torch; print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=plain_environment(OMP_DISPLAY_ENV="verbose"),
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"
    if "GOMP_SPINCOUNT" in done.stderr:  # GNU's, which Linux wheels of torch bring
        assert "GOMP_SPINCOUNT = '3000'" in done.stderr


SAMPLES = """
import os, statistics, subprocess, sys, time
import dmoe_var
vqvae = dmoe_var.load_vqvae("digits")
var = dmoe_var.load_var("digits", vqvae)
def seconds():
    times = []
    for _ in range(7):
        started = time.perf_counter()
        dmoe_var.generate(var, vqvae, list(range(8)))
        times.append(time.perf_counter() - started)
    return statistics.median(times)
seconds()
quiet = seconds()
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
beside = seconds()
busy.kill()
print(beside / quiet)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_beside_a_busy_process():
    """On two cores, on a machine that is quiet otherwise: at most three times the quiet time."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core alone")
    done = subprocess.run(
        [sys.executable, "-c", SAMPLES],
        env=plain_environment(),
        preexec_fn=lambda: os.sched_setaffinity(0, set(cores)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 3
