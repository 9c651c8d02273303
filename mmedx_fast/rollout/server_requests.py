"""Many requests to several servers at once, of which none is left behind whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from mmedx_fast.rollout.base import EngineError, Interrupted, Progress, RolloutError
from mmedx_fast.rollout.server_client import ServerClient, ServerError

_CONNECTIONS = 256
"""Requests in flight per server; the others wait here."""

Addressed = tuple[int, dict[str, Any]]
"""The number of a server, and the body that it is sent."""


class RequestError(RolloutError):
    """A request that failed: its index among those of the call, and the server's error."""

    def __init__(self, index: int, cause: ServerError) -> None:
        super().__init__(str(cause))
        self.index, self.cause = index, cause


class Asker:
    """Sends the requests of a call together and waits for all answers."""

    def __init__(self, servers: Sequence[ServerClient], timeout: float) -> None:
        """``timeout``: seconds without any answer that end a call."""
        self.servers = servers
        self.timeout = timeout
        self.interrupted = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def ask(
        self, requests: Sequence[Addressed], n: int, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Answers by request; ``n`` sequences each for ``progress``.

        Raises :class:`RequestError` for the first request that fails, ``EngineError`` when the
        servers fall silent, and ``Interrupted`` once :meth:`interrupt` is called.
        """
        try:
            return asyncio.run(self._ask(requests, n, progress))
        except asyncio.CancelledError as error:
            raise Interrupted("the rollouts were interrupted") from error

    def interrupt(self) -> None:
        """End an ``ask`` that runs, and those to come until :attr:`interrupted` is taken back."""
        self.interrupted = True
        running = self._running
        if running is not None:
            loop, task = running
            loop.call_soon_threadsafe(task.cancel)

    async def _ask(
        self, requests: Sequence[Addressed], n: int, progress: Progress | None
    ) -> list[dict[str, Any]]:
        task = asyncio.current_task()
        assert task is not None
        self._running = (asyncio.get_running_loop(), task)
        if self.interrupted:
            task.cancel()
        tasks: list[asyncio.Task[dict[str, Any]]] = []
        limits = httpx.Limits(max_connections=_CONNECTIONS * len(self.servers))
        try:
            async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as http:
                for index, (server, body) in enumerate(requests):
                    asked = self._one(http, self.servers[server], index, body)
                    tasks.append(asyncio.create_task(asked))
                await self._watch(tasks, n, progress)
                return [task.result() for task in tasks]
        finally:
            self._running = None
            # A connection that closes aborts its request in the server.
            for asking in tasks:
                asking.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(
        self, http: httpx.AsyncClient, server: ServerClient, index: int, body: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            return await server.generate(http, body)
        except ServerError as error:
            raise RequestError(index, error) from error

    async def _watch(
        self, tasks: list[asyncio.Task[dict[str, Any]]], n: int, progress: Progress | None
    ) -> None:
        """Until all are done; the first error, and servers that fall silent, end it."""
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(
                waiting, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                urls = ", ".join(server.url for server in self.servers)
                raise EngineError(
                    f"no answer from {urls} for {self.timeout:.0f} s with {len(waiting)} requests "
                    "out; look at its log, or raise rollout.server_timeout"
                )
            for task in done:
                task.result()
            if progress:
                progress((len(tasks) - len(waiting)) * n, len(tasks) * n)
