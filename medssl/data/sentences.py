"""Reports as sentences."""

import re
import zlib

_ENDS = re.compile(r"(?<=[.!?;])\s+|\s*\n\s*")
_LETTER = re.compile(r"[^\W\d_]")


def sentences(report: str) -> list[str]:
    """The sentences of a report in their order; lines are sentences of their own.

    A piece without a letter ("2.", "---") is none.
    """
    return [part.strip() for part in _ENDS.split(report) if _LETTER.search(part)]


def wording(sentence: str) -> int:
    """A number of 32 bits, equal for sentences of the same letters and digits in the same order."""
    return zlib.crc32(" ".join(re.findall(r"\w+", sentence.lower())).encode())
