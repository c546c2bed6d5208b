"""Which model a request asks for: `model` in its JSON, or in its multipart form.

The body is passed on as it came. Only where the service calls the model by another name, that name
takes the place of the client's, and not a byte beside it changes.
"""

import asyncio
import json
import mmap
import re
from email.parser import HeaderParser
from json.decoder import scanstring  # type: ignore[attr-defined]

from attrs import frozen

from mgpu_effects.errors import BrokerError
from mgpu_http.body import MEMORY_BYTES, SpooledBody

# JSON is read whole to find its model; a form, whose files may be larger, is only searched.
MAX_JSON_BYTES = 64 << 20
MOST_PARTS = 1000
FIELD = "model"
SPACE = re.compile(r"[ \t\n\r]*")


@frozen
class Asked:
    """The model that a body asks for, and the bytes from `start` to `end` that say so."""

    model: str
    start: int
    end: int
    in_json: bool

    def spelled(self, name: str) -> bytes:
        """Give another name as it has to stand there."""
        return json.dumps(name).encode() if self.in_json else name.encode()


async def asked_model(body: SpooledBody, content_type: str) -> Asked | None:
    """Find the model; None where the body names none. Raises `bad_request` where it has no shape.

    The content type only tells forms apart: many clients send JSON as something else.
    """
    look = _in_form if content_type.lower().startswith("multipart/form-data") else _in_json
    if body.size <= MEMORY_BYTES:
        return look(body, content_type)
    return await asyncio.to_thread(look, body, content_type)


async def renamed(body: SpooledBody, asked: Asked, name: str) -> SpooledBody:
    """Give a body that asks for another name instead, and let go of the old one."""
    new, position = SpooledBody(), 0
    try:
        with body.view() as view:
            for end, then in ((asked.start, asked.spelled(name)), (len(view), b"")):
                while position < end:
                    piece = view[position : min(end, position + MEMORY_BYTES)]
                    await new.append(piece)
                    position += len(piece)
                await new.append(then)
                position = max(position, asked.end)
    except BaseException:
        new.close()
        raise
    body.close()
    return new


# --------------------------------------------------------------------------------------- JSON


def _in_json(body: SpooledBody, _content_type: str) -> Asked | None:
    if body.size > MAX_JSON_BYTES:
        message = f"the model is looked for in JSON of at most {MAX_JSON_BYTES >> 20} MiB"
        raise BrokerError(code="bad_request", message=message)
    with body.view() as view:
        data = view[:]
    try:
        text = data.decode()
        return _member(text)
    except (ValueError, IndexError, RecursionError) as error:
        message = "the model is named in a JSON object or in a multipart form; this is neither"
        raise BrokerError(code="bad_request", message=message) from error


def _member(text: str) -> Asked | None:
    """Go through the outermost object, to where `model` stands; the last one counts."""
    decoder, found = json.JSONDecoder(), None
    at = _after(text, 0, "{")
    while text[at] != "}":
        key, at = scanstring(text, _after(text, at, '"'))
        start = _after(text, at, ":")
        value, end = decoder.raw_decode(text, start)
        if key == FIELD and isinstance(value, str):
            before = len(text[:start].encode())
            found = Asked(value, before, before + len(text[start:end].encode()), in_json=True)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _after(text: str, at: int, expected: str) -> int:
    """Give the place of what follows the expected character, blanks apart."""
    at = _skip(text, at)
    if text[at] != expected:
        raise ValueError(expected)
    return at + 1 if expected == '"' else _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    blanks = SPACE.match(text, at)
    return blanks.end() if blanks else at


# --------------------------------------------------------------------------------------- forms


def _in_form(body: SpooledBody, content_type: str) -> Asked | None:
    boundary = _parameter(f"Content-Type: {content_type}", "content-type", "boundary")
    if not boundary:
        raise BrokerError(code="bad_request", message="the form has no boundary")
    with body.view() as view:
        return _part(view, b"--" + boundary.encode())


def _part(view: bytes | mmap.mmap, delimiter: bytes) -> Asked | None:
    at = view.find(delimiter)
    for _ in range(MOST_PARTS):
        head_end = view.find(b"\r\n\r\n", at)
        end = view.find(b"\r\n" + delimiter, head_end)
        if at < 0 or head_end < 0 or end < 0:
            return None
        head = view[at + len(delimiter) + 2 : head_end].decode(errors="replace")
        start = head_end + 4
        if _parameter(head, "content-disposition", "name") == FIELD:
            return Asked(view[start:end].decode(errors="replace"), start, end, in_json=False)
        at = end + 2
    message = f"the form has more than {MOST_PARTS} parts"
    raise BrokerError(code="bad_request", message=message)


def _parameter(head: str, header: str, name: str) -> str | None:
    value = HeaderParser().parsestr(head).get_param(name, header=header)
    return value if isinstance(value, str) else None
