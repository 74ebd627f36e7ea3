"""A top-level JSON array, streamed: one row for each element, memory bounded by the longest element.

It knows nothing of files and compression (jsonl.py), nor of what an element means.
"""

import codecs
import json
from collections.abc import Iterator
from typing import IO

from minimind.data.rows import CHUNK, MAX_DEPTH, Place, Problem, Row, parse_row


class _Text:
    """A decoded window of the stream that grows on demand and forgets what was consumed."""

    def __init__(self, stream: IO[bytes], place: Place) -> None:
        self.stream, self.place = stream, place
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.ended = "", 0, False

    def more(self) -> None:
        data = self.stream.read(max(CHUNK, len(self.text) - self.position))
        self.ended = not data
        self.text = self.text[self.position :] + self.decoder.decode(data, final=self.ended)
        self.position = 0

    def consume(self, end: int) -> None:
        self.place.line += self.text.count("\n", self.position, end)
        self.position = end

    def next_sign(self) -> str:
        """Return the next character that is not white space, without consuming it; "" at the end."""
        while True:
            rest = self.text[self.position : self.position + 4096]
            stripped = rest.lstrip(" \t\r\n")
            self.consume(self.position + len(rest) - len(stripped))
            if stripped:
                return stripped[0]
            if not rest:
                if self.ended:
                    return ""
                self.more()


def scan_array(stream: IO[bytes], place: Place, limit: int) -> Iterator[Row | Problem]:
    """Yield every element of the array as a Row, or a Problem in its place; a fatal one where the array breaks."""
    text = _Text(stream, place)
    try:
        text.next_sign()
        text.consume(text.position + 1)
        if text.next_sign() == "]":
            text.consume(text.position + 1)
        else:
            yield from _elements(text, place, limit)
        if sign := text.next_sign():
            yield place.problem(f"{sign!r} after the end of the array", fatal=True)
    except UnicodeDecodeError as error:
        yield place.problem(f"not UTF-8 here or in the following lines: {error.reason}", fatal=True)
    except _BadArrayError as error:
        yield place.problem(str(error), fatal=True)


class _BadArrayError(Exception):
    pass


def _elements(text: _Text, place: Place, limit: int) -> Iterator[Row | Problem]:
    while True:
        if not text.next_sign():
            raise _BadArrayError("the file ends inside the array: expected an element")
        end = _element_end(text, place, limit)
        line = text.text[text.position : end].encode("utf-8", "surrogatepass")
        yield parse_row(line, place)
        text.consume(end)
        sign = text.next_sign()
        text.consume(text.position + 1 if sign else text.position)
        if sign == "]":
            return
        if sign != ",":
            raise _BadArrayError(
                f"expected ',' or ']' after an element of the array, found {sign or 'the end of the file'!r}"
            )


def _element_end(text: _Text, place: Place, limit: int) -> int:
    """Return where the element that starts at `text.position` ends, reading as much as it needs."""
    decoder = json.JSONDecoder()
    while True:
        try:
            end = decoder.raw_decode(text.text, text.position)[1]
            if end < len(text.text) or text.ended:
                return end
        except RecursionError:
            raise _BadArrayError(f"nested deeper than {MAX_DEPTH} levels") from None
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text.text) - 16
            if text.ended or not unfinished:
                place.line += text.text.count("\n", text.position, error.pos)
                column = error.pos - text.text.rfind("\n", 0, error.pos)
                raise _BadArrayError(f"not valid JSON: {error.msg} (column {column})") from None
        if len(text.text) - text.position > limit:
            raise _BadArrayError(f"the element is longer than {limit:,} characters")
        text.more()
