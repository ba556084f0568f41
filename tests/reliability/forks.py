"""The command line in forks of a process that has imported everything: a start costs a second
instead of ten, and many can be tested.

Apart from its imports such a process is what `python -m rlfr_vlm.cli` would be: a session, an
environment and open files of its own, and its exit code. `python -m tests.reliability.forks` is the
process that forks; it is told what to do by lines of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

from tests.runs import ROOT


class Forks:
    """The process that forks; a context manager."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.reliability.forks"]
        self._server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait(30)

    def ask(self, **order):
        """What it answers."""
        self._server.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._server.stdout.readline())

    def start(self, arguments, environment, log):
        """`rlfr-vlm ARGUMENTS` in a fork."""
        return Fork(self, self.ask(start=list(arguments), environment=environment, log=str(log)))


class Fork:
    """One of them, as a subprocess.Popen."""

    def __init__(self, forks, pid):
        self.forks, self.pid, self.returncode = forks, pid, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.forks.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=60.0):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"process {self.pid} still runs"
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def become(arguments, environment, log):
    """What a fork does."""
    from rlfr_vlm import cli

    os.setsid()
    os.environ.update(environment)
    tempfile.tempdir = None
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, os.devnull, os.O_WRONLY),
        (2, log, os.O_WRONLY | os.O_CREAT),
    ):
        handle = os.open(path, flags)
        os.dup2(handle, number)
        os.close(handle)
    sys.argv = ["rlfr-vlm", *arguments]
    cli.main()


def main():
    """Fork and look after the forks until nobody asks any more."""
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    import rlfr_vlm.commands  # noqa: F401

    while line := sys.stdin.readline():
        order = json.loads(line)
        if "start" in order:
            answer = os.fork()
            if answer == 0:
                become(order["start"], order["environment"], order["log"])
        else:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
