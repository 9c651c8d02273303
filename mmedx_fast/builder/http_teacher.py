"""Any OpenAI-compatible endpoint as the teacher: bounded concurrency, patient retries, no answer lost."""

from __future__ import annotations

import asyncio
import base64
import collections
import functools
import io
import ipaddress
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from mmedx_fast.builder.config import TeacherConfig
from mmedx_fast.builder.http_reply import TryAgain, check_status, read_reply
from mmedx_fast.builder.prompt import teacher_messages
from mmedx_fast.builder.teacher import (
    Ask,
    BudgetError,
    Ledger,
    OnError,
    OnReply,
    QuestionError,
    Reply,
    TeacherError,
)
from mmedx_fast.data.images import load_image
from mmedx_fast.data.records import ImageRef


class _Stopped(Exception):
    """The build ends, and this request has no answer yet."""


class OpenAITeacher:
    """``POST <base_url>/chat/completions``, images as data URLs."""

    def __init__(self, cfg: TeacherConfig, ledger: Ledger) -> None:
        """Raises ``TeacherError`` when the key's environment variable is not set."""
        self._cfg, self._ledger = cfg, ledger
        self._key = _key(cfg)
        self._headers = {"Content-Type": "application/json"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._free_at = [0.0] * len(cfg.base_urls)
        """When each endpoint may be asked again, on the monotonic clock."""
        self._homes: dict[str, int] = {}
        self._retries: collections.Counter[str] = collections.Counter()
        self._random = random.Random()

    def ask(self, asks: Sequence[Ask], on_reply: OnReply, on_error: OnError) -> None:
        if asks:
            asyncio.run(self._ask_all(asks, on_reply, on_error))

    def describe(self) -> dict[str, Any]:
        return {"endpoints": list(self._cfg.base_urls), "retries": dict(self._retries)}

    def close(self) -> None:
        pass

    async def _ask_all(self, asks: Sequence[Ask], on_reply: OnReply, on_error: OnError) -> None:
        self._stop, self._released = asyncio.Event(), asyncio.Event()
        self._failure: Exception | None = None
        self._interrupted = False
        self._failed_in_a_row = 0
        count = min(self._cfg.concurrency, len(asks))
        local = all(map(_is_local, self._cfg.base_urls))
        # The proxies of the environment are for the internet.
        async with httpx.AsyncClient(
            timeout=None, limits=httpx.Limits(max_connections=count), trust_env=not local
        ) as http:
            waiting = iter(asks)
            workers = [
                asyncio.create_task(self._work(http, waiting, on_reply, on_error))
                for _ in range(count)
            ]
            with self._interruptible(workers):
                ended = await asyncio.gather(*workers, return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError):
                raise error
        if self._interrupted:
            raise KeyboardInterrupt
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _interruptible(self, workers: Sequence[asyncio.Task[None]]) -> Iterator[None]:
        """Ctrl-C waits for the answers under way, which are paid for; a second one does not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            if self._interrupted:
                for worker in workers:
                    worker.cancel()
                return
            self._interrupted = True
            self._stop.set()
            said = "Waiting for the answers under way; press Ctrl-C again to give them up"
            print(f"\n{said}", file=sys.stderr, flush=True)

        before = signal.getsignal(signal.SIGINT)
        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, before)

    async def _work(
        self, http: httpx.AsyncClient, waiting: Iterator[Ask], on_reply: OnReply, on_error: OnError
    ) -> None:
        """One request after the other until none is left or the build stops."""
        try:
            for ask in waiting:
                if self._stop.is_set():
                    return
                try:
                    reply = await self._paid(http, ask)
                except QuestionError as error:
                    if self._cfg.on_error == "stop" or self._too_many(error):
                        raise
                    on_error(ask, error)
                else:
                    self._failed_in_a_row = 0
                    on_reply(ask, reply)
        except _Stopped:
            pass
        except TeacherError as error:
            self._failure = self._failure or error
            self._stop.set()
        except BaseException:
            self._stop.set()
            raise

    def _too_many(self, error: QuestionError) -> bool:
        self._failed_in_a_row += 1
        return self._failed_in_a_row >= self._cfg.max_failures

    async def _paid(self, http: httpx.AsyncClient, ask: Ask) -> Reply:
        reserved = await self._reserve(ask)
        try:
            reply = await self._answer(http, ask)
            self._ledger.add(reply)
            return reply
        finally:
            self._ledger.release(reserved)
            self._released.set()

    async def _reserve(self, ask: Ask) -> float:
        """Money for a request, once those under way have shown what they really cost."""
        while True:
            try:
                return self._ledger.reserve(ask)
            except BudgetError:
                if not self._ledger.under_way:
                    raise
            self._released.clear()
            await self._released.wait()
            if self._stop.is_set():
                raise _Stopped

    async def _answer(self, http: httpx.AsyncClient, ask: Ask) -> Reply:
        """The reply to one request after as many tries as it takes and the config grants."""
        body = await asyncio.to_thread(self._body, ask)
        # A question's requests meet in one endpoint's prefix cache; a retry tries the next endpoint.
        home = self._homes.setdefault(ask.record.id, len(self._homes))
        for tries in itertools.count(1):
            server = (home + tries - 1) % len(self._cfg.base_urls)
            await self._pause(self._free_at[server] - time.monotonic())
            try:
                return await self._once(http, server, ask, body)
            except TryAgain as fault:
                self._retries[fault.kind] += 1
                if fault.wait is not None:
                    self._hold(server, fault)
                if tries > self._cfg.max_retries:
                    raise QuestionError(
                        f"question {ask.record.id!r} ({ask.guideline}): no answer after {tries} "
                        f"tries; the last: {fault}. Start again to go on, raise teacher.max_retries, "
                        "or drop such questions with teacher.on_error=drop"
                    ) from None
                if fault.wait is None:
                    await self._pause(self._backoff(tries))
        raise AssertionError("the loop above has no end")

    def _hold(self, server: int, fault: TryAgain) -> None:
        """Leave an endpoint alone for as long as it asks for; nobody else need find out the same."""
        assert fault.wait is not None
        if fault.wait > self._cfg.max_retry_after:
            raise TeacherError(
                f"{fault}; it asks to wait for {fault.wait:.0f} s, more than teacher.max_retry_after = "
                f"{self._cfg.max_retry_after:.0f}: start again later"
            )
        spread = self._random.uniform(0, min(1.0, self._cfg.backoff))
        until = time.monotonic() + fault.wait + spread
        self._free_at[server] = max(self._free_at[server], until)

    def _backoff(self, tries: int) -> float:
        longest = min(self._cfg.max_backoff, self._cfg.backoff * 2 ** (tries - 1))
        return longest * self._random.uniform(0.5, 1.0)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless the build stops."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self._stop.wait(), seconds)
            except TimeoutError:
                return
        if self._stop.is_set():
            raise _Stopped

    async def _once(self, http: httpx.AsyncClient, server: int, ask: Ask, body: bytes) -> Reply:
        url = f"{self._cfg.base_urls[server]}/chat/completions"
        start = time.monotonic()
        try:
            # httpx's own timeouts are per read: a server that drips would never meet them.
            async with asyncio.timeout(self._cfg.timeout):
                response = await http.post(url, content=body, headers=self._headers)
        except TimeoutError:
            raise TryAgain(
                "timeout", f"the teacher {url} gave no answer in {self._cfg.timeout:g} s"
            ) from None
        except httpx.RequestError as error:
            kind = type(error).__name__
            raise TryAgain("connection", f"the teacher {url}: {kind}: {error}") from None
        check_status(response, ask, self._key)
        return read_reply(response, ask, time.monotonic() - start)

    def _body(self, ask: Ask) -> bytes:
        cfg = self._cfg
        urls = iter([_data_url(ref, cfg.max_pixels, cfg.image_format) for ref in ask.record.images])
        messages = teacher_messages(ask.record, ask.guideline, cfg)
        for message in messages:
            message["content"] = [
                {"type": "image_url", "image_url": {"url": next(urls)}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
        messages[0]["content"] = messages[0]["content"][0]["text"]  # some take no parts there
        body = {
            "model": cfg.model,
            "messages": messages,
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "max_tokens": cfg.max_tokens,
            "seed": ask.seed,
            **cfg.extra_body,
        }
        sent = {name: value for name, value in body.items() if value is not None}
        return json.dumps(sent, allow_nan=False).encode()


def _key(cfg: TeacherConfig) -> str | None:
    if cfg.api_key_env is None:
        return None
    key = os.environ.get(cfg.api_key_env, "").strip()
    if not key:
        raise TeacherError(
            f"the environment variable {cfg.api_key_env} (teacher.api_key_env) is not set; put the "
            "endpoint's key there, or set teacher.api_key_env=null for one that needs none"
        )
    return key


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost"


@functools.lru_cache(maxsize=64)
def _data_url(ref: ImageRef, max_pixels: int, image_format: str) -> str:
    """Kept for the other guidelines and attempts of the same question."""
    image = load_image(ref, max_pixels=max_pixels)
    buffer = io.BytesIO()
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG")
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
