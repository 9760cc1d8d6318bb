"""What decoding packages warn of, in fixed words: their own quote header values and paths."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

MORE_BYTES = "bytes follow the pixels"
MORE_FRAMES = "there are more frames than announced"
_PACKAGES = ("pydicom", "tifffile", "nibabel")
_KINDS = (
    (r"excess padding|trailing padding|non-conformant padding", MORE_BYTES),
    (r"frames have been found|contain .* frames which", MORE_FRAMES),
    (r"using (ex|im)plicit VR|Unknown VR|Expected 0x0|Expected sequence item",
     "the header is encoded otherwise than it says"),
    (r"Photometric Interpretation", "header and packed pixels name different color spaces"),
    (r"Bits Stored", "header and packed pixels name different numbers of bits"),
    (r"check that the transfer syntax|[Oo]ffset [Tt]able", "the packing of the pixels is unclear"),
    (r"encoding|[Cc]haracter [Ss]et|decode byte string", "text is in an unknown character set"),
    (r"decompression bomb", "the picture is very large"),
    (r"VR|Expected length|[Ii]nvalid|not valid", "a header value breaks the rules of its type"),
)  # fmt: skip
_HEARD: ContextVar[list[str] | None] = ContextVar("_HEARD", default=None)


@contextmanager
def hearing() -> Iterator[set[str]]:
    """What is warned of inside, filled when the block ends; nothing reaches logs or the screen."""
    doubts: set[str] = set()
    heard = _HEARD.get()
    if heard is not None:  # inside of another, which hears it too
        start = len(heard)
        try:
            yield doubts
        finally:
            doubts.update(heard[start:])
        return
    heard = []
    token = _HEARD.set(heard)
    _listen_to_loggers()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _warned
            yield doubts
    finally:
        _HEARD.reset(token)
        doubts.update(heard)


def repeat(doubts: frozenset[str]) -> None:
    """Have what is remembered heard again."""
    heard = _HEARD.get()
    if heard is not None:
        heard.extend(doubts)


def doubt_of(message: str) -> str:
    """The fixed words for a package's warning."""
    for pattern, words in _KINDS:
        if re.search(pattern, message):
            return words
    return "a decoding package warned of something else"


def _warned(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if not issubclass(category, DeprecationWarning):  # of a package, not of a file
        repeat(frozenset({doubt_of(str(message))}))


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        repeat(frozenset({doubt_of(record.getMessage())}))


_LISTENER = _Listener(logging.WARNING)


def _listen_to_loggers() -> None:
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.propagate = False
        logger.addHandler(_LISTENER)  # once, however often
