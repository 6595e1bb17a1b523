"""Starts scripts as children of one process that has imported all they need: a start costs 0.2 s.

Reads a JSON request a line ({"argv", "cwd", "stdout", "stderr", "kill", "env"}) and answers each
with the exit status, negative for a signal. "kill": [name, n] sends the child SIGKILL before its
n-th call of the function of that dotted name, [name, n, signal] another one. The digits are cut
to a few images.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import pkgutil
import runpy
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import dmoe_var.data

NUM_IMAGES = 40


@functools.cache
def few_digits(image_size, load=dmoe_var.data.load_digits):
    return tuple(
        replace(images, images=images.images[:NUM_IMAGES], labels=images.labels[:NUM_IMAGES])
        for images in load(image_size)
    )


def arm(name, n, number=signal.SIGKILL):
    """Send this process a signal before the n-th call of a function."""
    owner, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function, calls = getattr(owner, attribute), iter(range(1, 10**9))

    @functools.wraps(function)
    def armed(*args, **kwargs):
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, attribute, armed)


def become(request):
    """The child: stdin, stdout, stderr, arguments and folder of a fresh start, then the script."""
    for fd, name in enumerate(("/dev/null", request["stdout"], request["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whoever started the tests
        signal.signal(number, signal.SIG_DFL)  # may have them ignored
    os.chdir(request["cwd"])
    os.environ.update(request.get("env") or {})
    sys.argv = request["argv"]
    if request["kill"]:
        arm(*request["kill"])
    run_script()


def run_script():
    """The script of sys.argv, whose end is this process's. It ends at once: to take all modules
    down in good order would take longer than a script."""
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def warm_up():
    """Imports what a script would (AdamW more at its first use) and fills Hydra's caches."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    for module in ("dmoe_var.stages.sweep", "k_means_constrained"):
        pkgutil.resolve_name(module)
    pkgutil.resolve_name("_hydra")
    compose = pkgutil.resolve_name("_compose")
    options = SimpleNamespace(config_dir=None)
    with compose.composing("pipeline", options):
        compose.experiment_of("pipeline", "pipeline", ["seed=1", "moe.scales=[1]"])
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    dmoe_var.data.load_digits = few_digits
    few_digits(8)


def main():
    warm_up()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
