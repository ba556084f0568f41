"""Run a command, and end it with all that it started when it ends itself, when standard input
closes, or when the starter is gone.

    python -I keeper.py STARTER_PID GRACE_SECONDS COMMAND ...

It has to lead a process group of its own. It imports nothing of the package, so that it can run as
a file and starts at once.
"""

import os
import select
import signal
import subprocess
import sys
import time

PERIOD = 0.2  # seconds between two looks


def wanted(starter: int) -> bool:
    """Whether the starter lives and holds the pipe. A fork of it may hold the pipe too, so that
    both are asked.
    """
    return os.getppid() == starter and not select.select([0], [], [], PERIOD)[0]


def main(starter: int, grace: float, command: list[str]) -> None:
    """Does not return: the last signal is for this process too."""
    # a handler, unlike SIG_IGN, is not handed on to the command
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None and wanted(starter):
        pass
    if child.poll() is None:
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(PERIOD / 4)
    print(f"exit status {child.poll()}", flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
