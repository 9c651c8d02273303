"""One vLLM server over HTTP: what it was started with, its adapters, weights, caches and answers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import httpx

from mmedx_fast.rollout.base import EngineError, RolloutError

_ADMIN_SECONDS = 120.0
_RESET_SECONDS = 60.0
_COUNTERS = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")


class ServerError(RolloutError):
    """An answer that is no success. ``status`` is HTTP's, 0 for :class:`ServerGone`."""

    def __init__(self, url: str, status: int, problem: str) -> None:
        super().__init__(f"the rollout server {url} {problem}")
        self.status = status


class ServerGone(ServerError, EngineError):
    """A server that cannot be reached, whatever it is asked: another one may answer."""

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, 0, problem)


class ServerClient:
    """Calls raise ``ServerError`` with the server's address and its own words."""

    def __init__(self, url: str, timeout: float) -> None:
        """``timeout``: seconds for loading weights and adapters."""
        self.url = url
        self.timeout = timeout
        key = os.environ.get("VLLM_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        # The proxies of the environment are for the internet.
        self._http = httpx.Client(headers=self.headers, timeout=_ADMIN_SECONDS, trust_env=False)

    def healthy(self) -> bool:
        """Whether it answers at all and its engine lives."""
        try:
            return self._http.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def config(self) -> dict[str, Any]:
        """vLLM's configuration: ``model_config``, ``cache_config``, ``lora_config`` ..."""
        found = self._call("GET", "/server_info", params={"config_format": "json"}).json()
        config: dict[str, Any] = found["vllm_config"]
        return config

    def takes_tokens(self) -> bool:
        """Whether it has the endpoint that takes and gives token ids."""
        reply = self._http.post(f"{self.url}/inference/v1/generate", json={}, headers=self.headers)
        return reply.status_code != 404

    def load_adapter(self, name: str, folder: Path) -> None:
        try:
            body = {"lora_name": name, "lora_path": str(folder)}
            self._call("POST", "/v1/load_lora_adapter", json=body, timeout=self.timeout)
        except ServerError as error:
            if error.status == 404 and folder.is_dir():
                raise ServerError(
                    self.url,
                    404,
                    f"cannot find the adapter {folder}, or cannot load adapters while it runs; it "
                    "must see the run folder under the same path (a shared file system) and be "
                    "started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
                ) from error
            raise

    def unload_adapter(self, name: str) -> None:
        self._call("POST", "/v1/unload_lora_adapter", json={"lora_name": name})

    def load_weights(self, folder: Path) -> None:
        """Take the full weights of a model folder; every cache is to be reset afterwards."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._call("POST", "/collective_rpc", json=body, timeout=self.timeout)

    def reset_prefix_cache(self) -> None:
        """Retries while the blocks of aborted requests are still being given back."""
        until = time.monotonic() + _RESET_SECONDS
        while not self._call("POST", "/reset_prefix_cache").json()["success"]:
            if time.monotonic() > until:
                raise ServerError(
                    self.url,
                    200,
                    "cannot reset its prefix cache: others' requests are running on it",
                )
            time.sleep(0.1)

    def reset_image_caches(self) -> None:
        self._call("POST", "/reset_mm_cache")
        self._call("POST", "/reset_encoder_cache")

    def sleep(self) -> None:
        self._call("POST", "/sleep", params={"level": 1})

    def wake(self) -> None:
        self._call("POST", "/wake_up")

    def counters(self) -> tuple[float, float]:
        """(prompt tokens looked up in the prefix cache, those found) since the server started."""
        totals = dict.fromkeys(_COUNTERS, 0.0)
        for line in self._call("GET", "/metrics").text.splitlines():
            name = line.partition("{")[0]
            if name in totals:
                totals[name] += float(line.rpartition(" ")[2])
        queries, hits = totals.values()
        return queries, hits

    async def generate(self, http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """Token ids in, token ids out: the answer of ``/inference/v1/generate``."""
        # Not httpx's json=: the ban on a token is minus infinity, which strict JSON lacks.
        content = json.dumps(body)
        headers = {"Content-Type": "application/json", **self.headers}
        url = f"{self.url}/inference/v1/generate"
        try:
            reply = await http.post(url, content=content, headers=headers)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        answer: dict[str, Any] = self._checked(reply).json()
        return answer

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._checked(self._http.request(method, self.url + path, **options))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ServerGone:
        return ServerGone(
            self.url,
            f"does not answer ({type(error).__name__}: {error}); see that it runs, that the address "
            "is right and reachable from here, and raise rollout.server_timeout if it is only slow",
        )

    def _checked(self, reply: httpx.Response) -> httpx.Response:
        if reply.is_success:
            return reply
        path = reply.request.url.path
        problem = f"answers {path} with {reply.status_code}: {_message(reply)}"
        if reply.status_code in (401, 403):
            problem += "; set VLLM_API_KEY to the key it was started with"
        raise ServerError(self.url, reply.status_code, problem)


def _message(reply: httpx.Response) -> str:
    """The server's own words, out of any of the shapes vLLM gives them."""
    try:
        body = reply.json()
    except ValueError:
        return reply.text[:500]
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def wrong_settings(
    config: dict[str, Any], *, max_model_len: int, max_images: int, lora_rank: int
) -> list[str]:
    """What in a server's configuration would make rollouts fail or be wrong.

    ``max_model_len``: tokens; ``max_images``: of a prompt; ``lora_rank``: 0 without adapters.
    """
    model, lora = config["model_config"], config["lora_config"]
    limits = (model["multimodal_config"] or {}).get("limit_per_prompt") or {}
    images = limits.get("image", {}).get("count", max_images)
    rank = lora["max_lora_rank"] if lora else 0
    found = []
    if model["logprobs_mode"] != "processed_logprobs":
        found.append(f"--logprobs-mode {model['logprobs_mode']}, needed processed_logprobs")
    if model["max_model_len"] < max_model_len:
        found.append(f"--max-model-len {model['max_model_len']}, needed {max_model_len}")
    if images < max_images:
        found.append(f"--limit-mm-per-prompt for {images} images, needed {max_images} images")
    if rank < lora_rank:
        found.append(f"--max-lora-rank {rank}, needed {lora_rank} with --enable-lora")
    return found
