"""Why a file could not be read: what was expected, what came, what to do."""


class ReadError(Exception):
    """A file or series that cannot be read as an image.

    The message never holds a path, an identifier or a header's text; `inspect` shows those.
    argument: of `read_image` that would resolve it, where there is one.
    """

    argument: str | None = None


class UnsupportedFormatError(ReadError):
    """The file is of no kind that a reader knows."""


class CorruptFileError(ReadError):
    """The file is truncated, damaged or not what its beginning says."""


class NotDicomError(ReadError):
    """The file was taken for DICOM and is not."""


class TruncatedPixelDataError(CorruptFileError):
    """The pixel data end before the header says."""


class MissingDecoderError(ReadError):
    """No installed package can decode this transfer syntax."""


class NoPixelDataError(ReadError):
    """A DICOM object without an image."""


class EmptyCloudError(ReadError):
    """A cloud or depth picture without one measured point."""


class UnsupportedPhotometricError(ReadError):
    """A colour space or pixel layout that has no reader yet."""


class AmbiguousSeriesError(ReadError):
    """More than one volume where one was asked for; choose with `series=`."""

    argument = "series=ID"


class InconsistentGeometryError(ReadError):
    """Slices that do not form one grid, or a broken orientation, spacing or position."""


class MissingSlicesError(InconsistentGeometryError):
    """Slices are missing from the middle of a series."""

    argument = 'on_gap="insert_nan", "resample" or "keep"'


class DuplicateSlicesError(InconsistentGeometryError):
    """Two different slices claim one position."""

    argument = 'on_duplicate="first" or "last"'


def differing_slices(count: int) -> DuplicateSlicesError:
    """The error for positions that more than one slice claims."""
    return DuplicateSlicesError(
        f"more than one slice claims one position ({count} such positions): unless equal copies, "
        "the series holds several volumes that no header value tells apart; keep the files of one, "
        "or choose with on_duplicate="
    )
