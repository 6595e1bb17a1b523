"""`two_processes.py SCRIPT ...`: a script in two processes, in the environment that torchrun gives.

They are forked from one that has imported all they need; torchrun's own start takes many seconds.
As with torchrun, one that fails ends both, and its status is this one's.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from start_server import run_script

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PROCESSES = 2


def become(rank, port):
    """The script, as process `rank` of the group."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    run_script()


def main():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    sys.argv = [str(SCRIPTS / f"{sys.argv[1]}.py"), *sys.argv[2:]]
    running = set()
    for rank in range(PROCESSES):
        pid = os.fork()
        if pid == 0:
            become(rank, port)
        running.add(pid)
    first_failure = 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not first_failure:
            first_failure = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGTERM)
    sys.exit(first_failure)


if __name__ == "__main__":
    main()
