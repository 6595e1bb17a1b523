"""Write training metrics: to metrics.jsonl always, to wandb with the same lines when asked."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmoe_var.distributed import is_main
from dmoe_var.errors import ConfigError, InputError
from dmoe_var.files import note, write_text

WandbMode = Literal["disabled", "offline", "online"]


@dataclass(frozen=True)
class Tracking:
    """How wandb names a run: an experiment is a group, a stage is a type of job, and a variant is
    the run's name."""

    mode: WandbMode = "disabled"
    group: str = ""
    job_type: str = ""
    name: str = ""

    def check(self) -> None:
        """Raise ConfigError if wandb is not installed, or if the mode needs a login and nothing
        holds one: wandb itself would ask for it, or fail, once the first run starts."""
        if self.mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"wandb={self.mode}: the package wandb cannot be imported ({error}); allowed "
                "without it: disabled"
            ) from error
        if self.mode == "offline":
            return
        import requests

        settings = wandb.setup().settings
        known = (
            settings.api_key,
            os.environ.get("WANDB_API_KEY"),
            os.environ.get("WANDB_IDENTITY_TOKEN_FILE"),
            requests.utils.get_netrc_auth(settings.base_url),
        )
        if not any(known):
            raise ConfigError(
                f"wandb=online: no login for {settings.base_url} on this machine; run wandb login, "
                "set WANDB_API_KEY, or give wandb=offline and send the runs later with wandb sync"
            )

    def start(
        self,
        folder: Path,
        config: Mapping[str, Any],
        run_id: str | None = None,
        again: bool = False,
    ) -> Any:
        """Start a run of wandb with its files under `folder`; return None if wandb is off.

        again: go on with the run of that id. Raise InputError if wandb cannot start one.
        """
        if self.mode == "disabled":
            return None
        import wandb

        try:
            return wandb.init(
                project="dmoe-var",
                group=self.group or None,
                job_type=self.job_type or None,
                name=self.name or None,
                dir=folder,
                mode=self.mode,
                config=dict(config),
                id=run_id,
                # Offline there is no run to go on with: wandb sync joins what has the same id.
                resume="allow" if again and self.mode == "online" else None,
            )
        except Exception as error:  # of the network, the server, its own service process
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"wandb={self.mode}: no run could be started ({reason}); allowed beside it: "
                "offline, to be sent later with wandb sync, and disabled"
            ) from error

    def summarise(
        self, folder: Path, metrics: Mapping[str, float], config: Mapping[str, Any]
    ) -> None:
        """Log the numbers of a point of a sweep, which has no steps, once as a run of wandb."""
        run = self.start(folder, config)
        if run is not None:
            run.log(dict(metrics))
            run.finish()


OFF = Tracking()

RUN_ID_FILE = "wandb_run.txt"
"""File beside metrics.jsonl with the id of the folder's run of wandb."""


class MetricsLog:
    """Appends a JSON line per logged step, in the main process alone; a resumed run first drops the
    lines it will write again. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        resume_step: int = 0,
        tracking: Tracking = OFF,
        config: Mapping[str, Any] | None = None,
    ):
        self._wandb = None
        self.path = folder / "metrics.jsonl"
        if not is_main():
            return
        kept = [line for line in read_lines(self.path, step=int) if line["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if tracking.mode == "disabled":
            return
        begun = folder / RUN_ID_FILE
        again = resume_step > 0 and begun.exists()
        run_id = begun.read_text(encoding="utf-8").strip() if again else uuid.uuid4().hex[:8]
        self._wandb = tracking.start(folder, config or {}, run_id, again)
        write_text(begun, run_id + "\n")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of a step; step counts finished steps, from 1."""
        if not is_main():
            return
        line = {"step": step, **metrics}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(0 if kind is None else 1)


def read_lines(path: Path, **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Read the whole lines of a .jsonl file, none if it is missing; each has these keys, with
    values of these types. A last line that a kill cut short is left out. So is, with a note, what a
    crash of the machine leaves in the place of lines."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    lines = [_parsed(line.strip(b"\0 \r"), kinds) for line in whole if line]
    broken = lines.count(None)
    if broken:
        note(f"{path}: {broken} of {len(lines)} lines are broken and were left out")
    return [line for line in lines if line is not None]


def _parsed(line: bytes, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any] | None:
    """Parse a JSON object with these keys; return None for anything else."""
    try:
        content = json.loads(line.decode("utf-8"))
        return content if all(isinstance(content[key], kinds[key]) for key in kinds) else None
    except (ValueError, TypeError, KeyError):
        return None
