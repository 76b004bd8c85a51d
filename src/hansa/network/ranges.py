"""Which bytes of a body a request or an answer carries: ``Content-Range`` and ``Range`` of RFC 9110, one range each."""

from __future__ import annotations

import re
from typing import NamedTuple

from hansa.network.messages import Refusal

_CARRIED = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})")
_NONE_CARRIED = re.compile(r"bytes \*/([0-9]{1,15})")
_ASKED = re.compile(r"bytes=([0-9]{1,15})-([0-9]{0,15})")
_LENGTH = re.compile(r"[0-9]{1,15}")


class Part(NamedTuple):
    """The bytes from ``first`` up to, but not with, ``stop`` of a body of ``total``."""

    first: int
    stop: int
    total: int

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the body."""
        return self.first == 0 and self.stop == self.total

    @property
    def content_range(self) -> str:
        """As ``Content-Range`` says it; a part without bytes says nothing but the total.

        >>> Part(0, 5, 9).content_range, Part(0, 0, 9).content_range
        ('bytes 0-4/9', 'bytes */9')
        """
        where = f"{self.first}-{self.stop - 1}" if self.stop > self.first else "*"
        return f"bytes {where}/{self.total}"


def read_content_range(text: str) -> Part:
    """What ``Content-Range`` says; ``Refusal`` when it says nothing that can be.

    >>> read_content_range("bytes 5-8/9")
    Part(first=5, stop=9, total=9)
    """
    if nothing := _NONE_CARRIED.fullmatch(text):
        part = Part(0, 0, int(nothing[1]))
    elif carried := _CARRIED.fullmatch(text):
        part = Part(int(carried[1]), int(carried[2]) + 1, int(carried[3]))
    else:
        part = Part(0, 0, 0)
    if part.total == 0 or not (part.first < part.stop <= part.total or part.first == part.stop == 0):
        raise Refusal("malformed", f"Content-Range: expected bytes FIRST-LAST/TOTAL, found {text[:80]!r}")
    return part


def read_length(length: str | None, encoding: str | None) -> int:
    """What ``Content-Length`` says; ``Refusal`` when it says nothing, or when the body comes in chunks."""
    if length is None or encoding is not None or not _LENGTH.fullmatch(length):
        raise Refusal("length-required", "expected a body with its length in Content-Length, found none")
    return int(length)


def uploaded_part(length: int, content_range: str | None) -> Part:
    """The part of a body that a request of ``length`` bytes carries; all of it where it does not say otherwise.

    Raises ``Refusal`` when the two do not agree.
    """
    if content_range is None:
        return Part(0, length, length)
    part = read_content_range(content_range)
    if part.stop - part.first != length:
        raise Refusal(
            "malformed", f"Content-Range: expected the {length} bytes of Content-Length, found {content_range[:80]!r}"
        )
    return part


def asked_part(asked: str | None, total: int) -> Part:
    """The part of a body of ``total`` bytes that ``Range`` asks for; what is no single range asks for all of it.

    Raises ``Refusal`` when it begins behind the end.

    >>> asked_part("bytes=7-", 9), asked_part("bytes=0-99", 9), asked_part(None, 9)
    (Part(first=7, stop=9, total=9), Part(first=0, stop=9, total=9), Part(first=0, stop=9, total=9))
    """
    found = _ASKED.fullmatch(asked or "")
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        return Part(0, total, total)
    if int(found[1]) >= total:
        raise Refusal("range", f"Range: expected one that begins before byte {total}, found {asked}")
    return Part(int(found[1]), min(int(found[2] or total) + 1, total), total)
