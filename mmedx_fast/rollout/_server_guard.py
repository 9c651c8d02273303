"""Runs a server's command and ends it, with all its processes, as soon as the trainer is gone.

``python _server_guard.py TRAINER_PID COMMAND...`` in a session of its own. A trainer killed by SIGKILL
cannot clean up, and the GPUs of a server that outlives it stay taken. Standard library only.
"""

import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.5
GRACE_SECONDS = 10


def main() -> None:
    trainer, command = int(sys.argv[1]), sys.argv[2:]
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    server = subprocess.Popen(command)
    while server.poll() is None and not asked and os.getppid() == trainer:
        time.sleep(POLL_SECONDS)
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            print("the server did not end in time and is killed", flush=True)
    else:
        print(f"the server ended with exit code {server.returncode}", flush=True)
    # Whatever it started is in the same process group, and so is this guard.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
