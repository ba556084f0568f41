"""The command line under watch: what it opens, whom it connects to and what it starts, by an audit
hook; and how large it grows.

python -m tests.reliability.watched_cli LOG VERB ARGUMENT...
With RLFR_TEST_UNPROTECTED set, pictures are opened wherever rows say, however large: what the watch
must then see, it would see otherwise.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
)
CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def main() -> None:
    log, *arguments = sys.argv[1:]
    seen: dict[str, list[Any]] = {"opened": [], "connected": [], "started": []}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            seen["opened"].append(os.fsdecode(args[0]))
        elif event in CONNECTS:
            seen["connected"].append(f"{event} {args[1:]}")
        elif event in STARTS:
            seen["started"].append([event, str(args[1] if event == "subprocess.Popen" else args)])

    from rlfr_vlm import cli

    if os.environ.get("RLFR_TEST_UNPROTECTED"):
        from PIL import Image

        from rlfr_vlm.data import images

        images.locate = lambda name, roots: roots[0] / name
        images.MAX_PIXELS = Image.MAX_IMAGE_PIXELS = 10**12
    sys.addaudithook(hook)
    try:
        cli.main(arguments)
    finally:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        )
        mib = [
            own / 1024,
            used[1].ru_maxrss / 1024,
        ]  # the former's ru_maxrss begins with what its parent, the tests, once had
        figures = {"mib": mib, "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in used)}
        found = {name: list(dict.fromkeys(map(str, values))) for name, values in seen.items()}
        Path(log).write_text(json.dumps({**found, **figures}))


if __name__ == "__main__":
    main()
