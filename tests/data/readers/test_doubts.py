"""What packages warn of is told in fixed words, and nothing of it gets out otherwise."""

import logging
import warnings

import pytest
from pydicom.misc import warn_and_log

from medssl.data.readers.any import read_image
from medssl.data.readers.dicom_memo import forget
from medssl.data.readers.doubts import doubt_of, hearing, repeat


@pytest.mark.parametrize(
    ("message", "words"),
    [  # as pydicom 3.0 words them
        ("The pixel data is 8130 bytes long, which indicates it contains 2 bytes of excess padding "
         "to be removed", "bytes follow the pixels"),
        ("3 frames have been found in the encapsulated pixel data, which is larger than the given "
         "(0028,0008) 'Number of Frames' value of 2", "there are more frames than announced"),
        ("Expected explicit VR, but found implicit VR - using implicit VR for reading",
         "the header is encoded otherwise than it says"),
        ("The (0028,0004) 'Photometric Interpretation' value is 'RGB' however ...",
         "header and packed pixels name different color spaces"),
        ("Unknown encoding 'ISO-IR-999' - using default encoding instead",
         "text is in an unknown character set"),
        ("Invalid value for VR IS: '1A'. Please see ...",
         "a header value breaks the rules of its type"),
        ("Mr Smith is ill", "a decoding package warned of something else"),
    ],
)  # fmt: skip
def test_each_warning_has_words_that_quote_nothing(message, words):
    assert doubt_of(message) == words


def test_a_warning_and_its_log_line_are_one_doubt_and_reach_nobody(monkeypatch, recwarn):
    logged: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger(), "handlers", [listener := logging.Handler()])
    monkeypatch.setattr(listener, "emit", logged.append)
    with hearing() as outer:
        with hearing() as first:
            warn_and_log("Bits Stored of Smith^John")
        with hearing() as second:
            logging.getLogger("tifffile").warning("Smith^John is not valid")
        warnings.warn("decode_png moves", DeprecationWarning, stacklevel=1)
    assert first == {"header and packed pixels name different numbers of bits"}
    assert second == {"a header value breaks the rules of its type"}
    assert outer == first | second
    assert not logged
    assert not recwarn.list


def test_outside_warnings_are_everybodys_again(recwarn):
    with hearing():
        pass
    repeat(frozenset({"nobody listens"}))
    warnings.warn("Smith", stacklevel=1)
    assert len(recwarn.list) == 1


def test_a_value_that_is_converted_once_raises_its_doubt_each_time(tmp_path, write_ct_series):
    """Equal header values are converted once, and headers are remembered."""
    write_ct_series(tmp_path, StudyInstanceUID="1.2.3.47")
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert content.count(b"1.2.3.47") == 1
        file.write_bytes(content.replace(b"1.2.3.47", b"Smith^Jo"))
    for _ in range(2):
        for _ in range(2):
            image = read_image(tmp_path)
            assert image.provenance["doubts"] == ["a header value breaks the rules of its type"]
        forget()
