"""Rows of a JSON file, one at a time: an array of objects, however large, or one object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmedx_fast.data.rows import Row, RowError, checked_object, read_jsonl

CHUNK_BYTES = 1 << 20
MAX_ELEMENT_CHARS = 64 << 20
"""An element of an array that is longer is refused, so that a damaged file cannot fill memory."""

_BLANKS = " \t\n\r"
_LONGEST_TOKEN = len("-Infinity")
_SCAN = json.JSONDecoder().raw_decode


def read_json(file: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Rows of a ``.json`` file: of the array that it holds or, where its first character is no
    ``[``, one object a line (``read_jsonl``), as many files of that name are.
    """
    with file.open("rb") as source:
        start = source.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return read_json_array(file) if start.startswith(b"[") else read_jsonl(file)


def read_json_array(file: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (element number from 1, object or ``RowError``) of a file that is one JSON array.

    In memory at a time: the chunk being read and one element. An element that is no object, or that
    is not valid UTF-8, is a ``RowError``. Raises ``ValueError`` naming file, byte and element where
    the array itself breaks off (a truncated file) or is not JSON, after yielding what stands before:
    where the next element would begin is then unknown. An empty file yields nothing.
    """
    with file.open("rb") as source:
        array = _Array(file, source)
        if array.peek() == "":
            return
        array.expect("[", "is no JSON array (it does not begin with '[')")
        if array.peek() == "]":
            array.expect("]", "")
        else:
            while True:
                yield array.number, array.element()
                if array.peek() != ",":
                    break
                array.expect(",", "")
            array.expect("]", "has neither ',' nor ']' after an element")
        if array.peek():
            raise array.error("goes on after the array's end")


class _Array:
    """A window of text that moves over the file: ``_text[_at:]`` is what was read and not used."""

    def __init__(self, file: Path, source: BinaryIO) -> None:
        self._file = file
        self._source = source
        # Bytes that are not UTF-8 become lone surrogates, for which the one row that has them is refused.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._at = 0
        self._read = 0
        self._ended = False
        self.number = 1

    def peek(self) -> str:
        """The next character that is no blank, or "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, character: str, problem: str) -> None:
        found = self.peek()
        if found == "":
            raise self._cut_off()
        if found != character:
            raise self.error(problem)
        self._at += 1

    def element(self) -> Row | RowError:
        """The next element, with which ``number`` moves on."""
        if self.peek() == "":
            raise self._cut_off()
        while True:
            found = self._scan()
            # A number may go on in the next chunk, so something must follow.
            if found is not None and (found[1] < len(self._text) or self._ended):
                break
            if len(self._text) - self._at > MAX_ELEMENT_CHARS:
                raise self.error(f"has over {MAX_ELEMENT_CHARS} characters in {self._place()}")
            if not self._more() and found is None:
                raise self._cut_off()
        value, end = found
        row = checked_object(value, self._text[self._at : end])
        self._at = end
        self.number += 1
        return row

    def _scan(self) -> tuple[Any, int] | None:
        """The element and where it ends, or ``None`` when what was read may be only its beginning."""
        try:
            return _SCAN(self._text, self._at)
        except json.JSONDecodeError as error:
            # What is merely cut off fails at its last token: a string anywhere, anything else at the end.
            cut_off = error.msg.startswith("Unterminated")
            if not cut_off and error.pos < self._end_of_text() - _LONGEST_TOKEN:
                raise self.error(f"is malformed in {self._place()} ({error.msg})") from None
        except RecursionError:
            raise self.error(f"is nested too deeply in {self._place()}") from None
        except ValueError as error:  # an integer of more digits than Python converts
            raise self.error(f"is malformed in {self._place()} ({error})") from None
        return None

    def _end_of_text(self) -> int:
        """How far the text goes; beyond it at the end of the file, where nothing can follow."""
        return len(self._text.rstrip()) + (_LONGEST_TOKEN if self._ended else 0)

    def _place(self) -> str:
        return f"element {self.number}"

    def _more(self) -> bool:
        """Read on; as much again as is waiting, so that a long element is not scanned often."""
        if self._ended:
            return False
        waiting = self._text[self._at :]
        chunk = self._source.read(max(CHUNK_BYTES, len(waiting)))
        self._ended = not chunk
        self._read += len(chunk)
        self._text = waiting + self._decoder.decode(chunk, final=self._ended)
        self._at = 0
        return True

    def _cut_off(self) -> ValueError:
        return self.error(f"is cut off in or before {self._place()}")

    def error(self, problem: str) -> ValueError:
        rest = self._text[self._at :].encode("utf-8", "surrogateescape")
        return ValueError(
            f"{self._file}: the file {problem}, at byte {self._read - len(rest)}; "
            "copy it again from its source"
        )
