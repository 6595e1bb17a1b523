"""Run the points of a multirun as jobs of a cluster, if they are not to run here one by one.

A job is the script itself with the overrides of one point, and leaves what the script leaves
anywhere. submitit sends it to SLURM or, to try things out, to processes of this machine.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dmoe_var.config_fields import STRICT, Positive
from dmoe_var.errors import ConfigError

Word = Annotated[str, Field(min_length=1)]
GRACE_S = 120
"""Seconds between SLURM's warning and its kill; a job that is warned is sent again."""


INSTEAD = {
    "mem": "mem_gb", "mem_per_cpu": "mem_gb", "mem_per_gpu": "mem_gb",
    "cpus_per_task": "cpus", "cpus_per_gpu": "cpus",
    "gpus": "gpus", "gpus_per_node": "gpus", "gpus_per_task": "gpus",
}  # fmt: skip
"""Options of sbatch that say what a key says in another way; sbatch refuses both together."""
OUTER_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "TORCHELASTIC_")
OUTER_TORCHRUN = (
    "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE",
)  # fmt: skip
"""Variables (or prefixes, above) that describe the job or torchrun that this process runs in."""
OF_THE_CLUSTER = (
    "SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION",
)  # fmt: skip
"""Variables that only a user sets; no job sets them for what it starts."""


@dataclass(frozen=True)
class LauncherConfig:
    """What a job asks for; each point of a multirun (-m) is a job."""

    __pydantic_config__ = STRICT

    cluster: Literal["slurm", "local"] | None = None
    """slurm; local: all jobs as processes of this machine; null: no jobs, points run one by one."""
    partition: Word | None = None
    """SLURM partition; null leaves it to the cluster."""
    account: Word | None = None
    """SLURM account; null leaves it to the cluster."""
    qos: Word | None = None
    """SLURM quality of service; null leaves it to the cluster."""
    constraint: Word | None = None
    """SLURM constraint on nodes; null leaves it to the cluster."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs per job; with several, torchrun starts a process on each."""
    cpus: Positive | None = 8
    """CPUs per job; null leaves them to the cluster."""
    mem_gb: Positive | None = 64
    """Gigabytes of memory per job; null leaves it to the cluster."""
    hours: Annotated[float, Field(gt=0)] = 24.0
    """Time limit of a job, in hours."""
    parallel: Positive = 8
    """Most jobs of an array that run at once."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often a job that ran out of time is sent again, to go on where it was."""
    setup: tuple[Word, ...] = ()
    """Lines of shell that run before the job, such as "module load cuda"."""
    more: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """More options of sbatch by name, such as {mail-type: END}, which stand above the keys here;
    mem-per-gpu, cpus-per-gpu and gres replace mem_gb, cpus and gpus."""

    def command(self, script: str, overrides: Sequence[str]) -> list[str]:
        """Build the command line of one point."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.gpus}"]
        return [sys.executable, *(torchrun if self.gpus > 1 else []), script, *overrides]

    def parameters(self, name: str) -> dict[str, Any]:
        """Build the parameters of submitit's AutoExecutor; only SLURM reads names with slurm_."""
        more = {option.replace("-", "_"): value for option, value in self.more.items()}
        said = {key for option, key in INSTEAD.items() if option in more}
        if str(more.get("gres", "")).startswith("gpu"):
            said.add("gpus")
        cpus = None if "cpus" in said else self.cpus
        asked = {
            "name": name,
            "timeout_min": max(1, round(60 * self.hours)),
            "cpus_per_task": cpus,
            # Since SLURM 22.05 a job's step no longer takes the number of CPUs from the job.
            "slurm_srun_args": ["--cpus-per-task", str(cpus)] if cpus is not None else None,
            "mem_gb": None if "mem_gb" in said else self.mem_gb,
            "gpus_per_node": None if "gpus" in said else self.gpus or None,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_array_parallelism": self.parallel,
            "slurm_signal_delay_s": GRACE_S,
            "slurm_setup": list(self.setup) or None,
            "slurm_additional_parameters": more or None,
        }
        return {key: value for key, value in asked.items() if value is not None}


@dataclass(frozen=True)
class Finished:
    """Holds how a job ended: its exit status, its output, and one line about its error."""

    status: int
    output: str
    error: str


class Job:
    """Runs a command with its streams in two files, and returns the exit status. A job that is sent
    again appends to the files."""

    process: subprocess.Popen[bytes] | None = None

    def __call__(self, command: Sequence[str], streams: str) -> int:
        with open(f"{streams}.out", "ab") as out, open(f"{streams}.err", "ab") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, preexec_fn=_not_warned)
            return self.process.wait()

    def checkpoint(self, command: Sequence[str], streams: str) -> Any:
        """End the script when time runs out, and tell submitit what to send again: the same
        command, because a script goes on where it was."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
        return DelayedSubmission(Job(), command, streams)


def _not_warned() -> None:
    """Ignore SLURM's warning in the script. It goes to all processes of a job, and would kill those
    that do not expect it before submitit has acted."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the variables of the job or torchrun that this process may run in: its own jobs would
    take them for theirs (an interactive allocation's size, for example)."""
    outer = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(OUTER_JOB) or name in OUTER_TORCHRUN) and name not in OF_THE_CLUSTER
    }
    for name in outer:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(outer)


def check(config: LauncherConfig) -> None:
    """Raise ConfigError if jobs are asked for but submitit is not installed."""
    if config.cluster is not None and importlib.util.find_spec("submitit") is None:
        raise ConfigError(
            f"launcher.cluster={config.cluster}: the package submitit is not installed; install "
            "dmoe-var[slurm], or use launcher=local"
        )


def run_jobs(
    config: LauncherConfig, script: Path, points: Sequence[Sequence[str]], folder: Path
) -> list[Finished]:
    """Send a job for each point (its overrides), wait for all, and say how each ended.

    Logs go to a new folder under `folder`. Raises ConfigError if the cluster cannot be reached. An
    interrupt from the keyboard cancels the jobs; they survive a lost connection.
    """
    import submitit

    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    logs = folder.resolve() / f"{script.stem}-{started}-{os.getpid()}"
    logs.mkdir(parents=True)
    commands = [config.command(str(script.resolve()), overrides) for overrides in points]
    streams = [logs / f"{number:03d}" for number in range(len(points))]
    try:
        executor = submitit.AutoExecutor(
            logs / "%j", cluster=config.cluster, slurm_max_num_timeout=config.restarts
        )
        executor.update_parameters(**config.parameters(script.stem))
        with _outside_of_jobs():
            jobs = executor.map_array(Job(), commands, [str(path) for path in streams])
    except RuntimeError as error:  # there is no such cluster, or sbatch refused
        raise ConfigError(f"launcher.cluster={config.cluster}: {error}") from error
    try:
        return [_finished(*each) for each in zip(jobs, points, streams, strict=True)]
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel(check=False)
        raise


def _finished(job: Any, overrides: Sequence[str], streams: Path) -> Finished:
    """Wait for a job, and say how it ended."""
    output, errors = streams.with_suffix(".out"), streams.with_suffix(".err")
    point = " ".join(overrides)
    if job.exception() is not None:  # cancelled, killed, out of memory or time
        error = f"{point}: job {job.job_id} ended without a result ({job.state}); see {errors}"
        return Finished(1, "", error)
    status = job.result()
    lines = errors.read_text("utf-8", "replace").strip().splitlines()
    said = lines[-1] if lines else f"exit status {status}"
    error = f"{point}: {said} (all of it: {errors})" if status else ""
    return Finished(status, output.read_text("utf-8", "replace"), error)
