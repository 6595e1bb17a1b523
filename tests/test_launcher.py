"""Jobs: what they ask for, how they end, on SLURM's commands played by scripts and as processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dmoe_var import launcher
from dmoe_var.errors import ConfigError
from dmoe_var.launcher import Finished, Job, LauncherConfig, run_jobs

SCRIPT = """
import sys
print(*sys.argv[1:])
if "fail=1" in sys.argv:
    print("noise", file=sys.stderr)
    sys.exit("seed=-1: wrong")
"""
SBATCH = """#!/bin/bash
cp "$1" "$PLAYED_FOLDER/sbatch.sh"; env > "$PLAYED_FOLDER/env"
if [ "$PLAYED_REFUSES" ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
echo "Submitted batch job 77"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1
export SLURM_ARRAY_JOB_ID=77
for i in $(seq 0 "$last"); do
  export SLURM_JOB_ID=10$i SLURM_ARRAY_TASK_ID=$i
  (sleep 0.2; bash "$PLAYED_FOLDER/sbatch.sh") > "$PLAYED_FOLDER/log" 2>&1 &
done
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [ "$1" = --unbuffered ] || shift; shift; done
[[ $SLURM_ARRAY_TASK_ID == $PLAYED_CANCELS ]] || exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for i in 0 1; do
  [[ $i == $PLAYED_CANCELS ]] && echo "77_$i|CANCELLED|n" || echo "77_$i|RUNNING|n"
done
"""


@pytest.fixture
def script(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    path = tmp_path / "some.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The commands of SLURM, and the folder in which the batch file is left."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PLAYED_FOLDER", str(folder))
    monkeypatch.setenv("PLAYED_CANCELS", "none")
    return folder


def flags(folder):
    lines = (folder / "sbatch.sh").read_text().splitlines()
    pairs = (x.removeprefix("#SBATCH --").partition("=") for x in lines if x.startswith("#SBATCH"))
    return {key: value for key, _, value in pairs}


def test_what_is_not_asked_for():
    asked = LauncherConfig("slurm", gpus=0).parameters("some")
    assert {"gpus_per_node", "slurm_partition", "slurm_setup"}.isdisjoint(asked)
    assert LauncherConfig("slurm", gpus=4).parameters("some")["gpus_per_node"] == 4


PLAIN = {"mem": "64GB", "cpus-per-task": "8", "gpus-per-node": "1"}


@pytest.mark.parametrize(
    ("settings", "gone", "sent"),
    [
        ({}, (), {}),
        ({"mem_gb": None, "cpus": None}, ("mem", "cpus-per-task"), {}),
        ({"more": {"mem-per-gpu": "40G"}}, ("mem",), {"mem-per-gpu": "40G"}),
        ({"more": {"mem_per_cpu": "4G"}}, ("mem",), {"mem-per-cpu": "4G"}),
        ({"more": {"cpus-per-gpu": 4}}, ("cpus-per-task",), {"cpus-per-gpu": "4"}),
        ({"more": {"gres": "gpu:a100:2"}}, ("gpus-per-node",), {"gres": "gpu:a100:2"}),
        ({"more": {"gpus-per-node": "a100:1"}}, (), {"gpus-per-node": "a100:1"}),
    ],
)
def test_one_option_for_each_thing(script, slurm, tmp_path, settings, gone, sent):
    """Null leaves it to the cluster, and what `more` says in another way is said once."""
    import submitit

    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="slurm")
    executor.update_parameters(**LauncherConfig("slurm", **settings).parameters("some"))
    text = executor._executor._make_submission_file_text("command", "uid")
    (tmp_path / "sbatch.sh").write_text(text)
    kinds = ("mem", "cpus", "gpus", "gres")
    ours = {key: value for key, value in flags(tmp_path).items() if key.startswith(kinds)}
    assert ours == {k: v for k, v in {**PLAIN, **sent}.items() if k not in gone}
    assert text.count("#SBATCH --gpus-per-node") <= 1


OUTER = {
    "SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_PER_TASK": "1",
    "SBATCH_MEM_BIND": "local", "SRUN_CPUS_PER_TASK": "1", "SUBMITIT_EXECUTOR": "slurm",
    "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
USERS = {"SLURM_CONF": "/etc/other.conf", "SBATCH_ACCOUNT": "us", "LAUNCHED_BY": "me"}


def test_jobs_sent_from_within_a_job(slurm, script, tmp_path, monkeypatch):
    """Such as an interactive allocation: they are not told its sizes, and it keeps them. Here the
    cluster refuses them."""
    for name, value in {**OUTER, **USERS, "PLAYED_REFUSES": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"launcher.cluster=slurm: (.|\n)*invalid partition"):
        run_jobs(LauncherConfig("slurm"), script, [["a=1"]], tmp_path / "logs")
    seen = dict(
        line.split("=", 1) for line in (slurm / "env").read_text().splitlines() if "=" in line
    )
    assert seen.keys().isdisjoint(OUTER)
    assert {name: seen[name] for name in USERS} == USERS
    assert {name: os.environ[name] for name in OUTER} == OUTER


def test_an_interrupt_cancels_the_jobs(slurm, script, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (slurm / "scancel").write_text('#!/bin/bash\necho "$1" >> "$PLAYED_FOLDER/cancelled"\n')
    (slurm / "scancel").chmod(0o755)
    monkeypatch.setattr(launcher, "_finished", interrupt)
    monkeypatch.setenv("PLAYED_CANCELS", "*")  # none starts
    with pytest.raises(KeyboardInterrupt):
        run_jobs(LauncherConfig("slurm"), script, [["a=1"], ["a=2"]], tmp_path / "logs")
    assert (slurm / "cancelled").read_text().split() == ["77_0", "77_1"]


def test_a_process_on_each_gpu():
    assert LauncherConfig(gpus=1).command("a.py", ["b=1"]) == [sys.executable, "a.py", "b=1"]
    command = LauncherConfig(gpus=4).command("a.py", ["b=1"])
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[-3:] == ["--nproc-per-node=4", "a.py", "b=1"]


FAILS = ["a=2", "fail=1"]


def assert_failed(finished):
    """By the script's own line and status."""
    assert (finished.status, finished.output) == (1, "a=2 fail=1\n")
    assert finished.error.startswith("a=2 fail=1: seed=-1: wrong (all of it: ")


def test_jobs_of_slurm(slurm, script, tmp_path):
    """Each is the script with its own overrides; sbatch is told what the configuration says."""
    config = LauncherConfig(
        "slurm", partition="big", account="us", qos="high", constraint="a100", gpus=1, cpus=12,
        mem_gb=100, hours=1.5, parallel=2, setup=("export SEEN=1",),
        more={"mail-type": "END", "qos": "low"},
    )  # fmt: skip
    points = [["a=1", "x=[1,2] 3"], FAILS]
    first, second = run_jobs(config, script, points, tmp_path / "logs")
    assert first == Finished(0, "a=1 x=[1,2] 3\n", "")
    assert_failed(second)
    asked = {
        "array": "0-1%2", "partition": "big", "account": "us", "qos": "low", "constraint": "a100",
        "gpus-per-node": "1", "cpus-per-task": "12", "mem": "100GB", "time": "90",
        "job-name": "some", "mail-type": "END", "signal": "USR2@120",
    }  # fmt: skip
    found = flags(slurm)
    assert {key: found.get(key) for key in asked} == asked
    assert "export SEEN=1" in (slurm / "sbatch.sh").read_text().splitlines()


def test_jobs_of_this_machine(script, tmp_path):
    config = LauncherConfig("local", hours=0.1)
    assert_failed(*run_jobs(config, script, [FAILS], tmp_path / "logs"))


@pytest.mark.slow
def test_a_job_that_was_cancelled(slurm, script, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAYED_CANCELS", "1")
    points = [["a=1"], ["a=2"]]
    finished = run_jobs(LauncherConfig("slurm"), script, points, tmp_path / "logs")
    assert [each.status for each in finished] == [0, 1]
    assert finished[1].error.startswith("a=2: job 77_1 ended without a result (CANCELLED); see ")


def test_no_cluster(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"launcher.cluster=slurm: Could not detect"):
        run_jobs(LauncherConfig("slurm"), script, [["a=1"]], tmp_path)


def test_without_submitit(monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    launcher.check(LauncherConfig("slurm"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    launcher.check(LauncherConfig())
    with pytest.raises(
        ConfigError, match=r"slurm: the package submitit is not .*dmoe-var\[slurm\]"
    ):
        launcher.check(LauncherConfig("slurm"))


def test_out_of_time(tmp_path):
    """The script ends, and the same job is sent again; SLURM's warning itself kills no script."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    job, ended = Job(), []
    arguments = (command, str(tmp_path / "streams"))
    thread = threading.Thread(target=lambda: ended.append(job(*arguments)))
    thread.start()
    while not (tmp_path / "streams.out").exists() or (tmp_path / "streams.out").stat().st_size == 0:
        time.sleep(0.02)
    job.process.send_signal(signal.SIGUSR2)
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(0.2)
    again = job.checkpoint(*arguments)
    thread.join()
    assert ended == [-signal.SIGTERM]
    assert isinstance(again.function, Job)
    assert again.args == arguments
    assert Job()([sys.executable, "-c", "print(2)"], arguments[1]) == 0
    assert (tmp_path / "streams.out").read_text() == "1\n2\n"  # sent again, it writes on
