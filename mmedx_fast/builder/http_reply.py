"""What an endpoint's reply means: an answer, something worth another try, or the end."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

import httpx

from mmedx_fast.builder.teacher import (
    CHARACTERS_PER_TOKEN,
    Ask,
    QuestionError,
    Reply,
    TeacherError,
)

_AGAIN = (408, 409, 425, 429)
_ABOUT_THE_QUESTION = (400, 413, 422)


class TryAgain(Exception):
    """A fault that may pass. ``kind`` is what it is counted by; ``wait``: seconds the server asks for."""

    def __init__(self, kind: str, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.kind, self.wait = kind, wait


def check_status(response: httpx.Response, ask: Ask, key: str | None) -> None:
    """Raises ``TryAgain``, ``QuestionError`` or ``TeacherError`` unless it is a success."""
    status = response.status_code
    if response.is_success:
        return
    said = _said(response, key)
    problem = f"{_where(response)} answers with {status}: {said}"
    quota = status == 429 and "insufficient_quota" in response.text
    if (status in _AGAIN or status >= 500) and not quota:
        raise TryAgain(str(status), problem, retry_after(response.headers.get("retry-after")))
    if status in _ABOUT_THE_QUESTION:
        raise QuestionError(
            f"question {ask.record.id!r} ({ask.guideline}): {problem}; correct teacher settings (model, "
            "max_tokens, max_pixels), or drop such questions with teacher.on_error=drop"
        )
    if status in (401, 403):
        problem += "; teacher.api_key_env must name the environment variable that holds a valid key"
    elif status == 404:
        problem += (
            "; teacher.base_urls must end before /chat/completions, and teacher.model exist there"
        )
    raise TeacherError(problem)


def read_reply(response: httpx.Response, ask: Ask, seconds: float) -> Reply:
    """The answer of a success; ``TryAgain`` for a body that holds none."""
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"].get("content")
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TryAgain(
            "no answer in the reply",
            f"{_where(response)} gives no chat completion ({type(error).__name__}; "
            f"{response.headers.get('content-type')}): {response.text[:200]!r}",
        ) from None
    if isinstance(text, list):  # content parts
        text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
    # A refusal or an answer that was cut inside hidden reasoning has null: it was paid for all the same.
    if not isinstance(text, str | None) or not isinstance(reason, str | None):
        raise TryAgain("no answer in the reply", f"{_where(response)}: content is {text!r:.200}")
    tokens = _usage(body.get("usage"))
    estimate = (ask.tokens_in, len(text or "") // CHARACTERS_PER_TOKEN + 1)
    served = body.get("model")
    return Reply(
        text=text or "",
        finish_reason=reason,
        tokens_in=(tokens or estimate)[0],
        tokens_out=(tokens or estimate)[1],
        estimated=tokens is None,
        model=served if isinstance(served, str) else "",
        seconds=round(seconds, 3),
    )


def _usage(usage: Any) -> tuple[int, int] | None:
    counts = usage if isinstance(usage, dict) else {}
    found = (counts.get("prompt_tokens"), counts.get("completion_tokens"))
    if all(isinstance(n, int) and n >= 0 for n in found):
        return found  # type: ignore[return-value]
    return None


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given in seconds or as a date; None where it says nothing."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _where(response: httpx.Response) -> str:
    return f"the teacher {response.request.url}"


def _said(response: httpx.Response, key: str | None) -> str:
    """The server's own words, in any of the usual shapes, without the key that some repeat."""
    text = response.text
    try:
        body = json.loads(text)
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    text = " ".join(text.split())[:500]
    return text.replace(key, "***") if key else text
