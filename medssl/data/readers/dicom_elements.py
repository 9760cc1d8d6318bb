"""Header values of many like files: what was converted once is not converted again."""

from collections import OrderedDict
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.tag import Tag

from medssl.data.readers.doubts import hearing, repeat

_MOST = 1 << 14  # values remembered
_LONGEST = 128  # bytes; longer ones hardly repeat

_TAGS: dict[Any, int] = {}
_CONVERTED: "OrderedDict[tuple[Any, ...], tuple[DataElement, frozenset[str]]]" = OrderedDict()


class Elements:
    """A dataset's values by keyword or tag, as `dataset.get` gives them, several times as fast.

    The slices of a series share most of their header. A value is looked up by its bytes, so that
    equal bytes are converted once; sequences, long and already converted values are pydicom's.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._encoding = dataset.original_character_set
        self._encoding_name = str(self._encoding)
        # by plain integers: pydicom's tags compare in Python, which is most of a lookup's time
        self._raw = {int(tag): element for tag, element in dataset.items()}

    @property
    def transfer_syntax(self) -> str:
        """Its name, such as "JPEG 2000 Image Compression"; a private one is not quoted."""
        return syntax_name(self.dataset.file_meta.TransferSyntaxUID)

    def __contains__(self, name: Any) -> bool:
        return _tag(name) in self._raw

    def get(self, name: Any, otherwise: Any = None) -> Any:
        """The value, None of an empty element, `otherwise` of an absent one."""
        tag = _tag(name)
        raw = self._raw.get(tag)
        if raw is None:
            return otherwise
        if (
            not isinstance(raw, RawDataElement)
            or raw.VR == "SQ"
            or len(raw.value or b"") > _LONGEST
        ):
            return self.dataset[tag].value
        key = (tag, raw.VR, raw.value, raw.is_little_endian, self._encoding_name)
        found = _CONVERTED.get(key)
        if found is None:
            with hearing() as doubts:
                element = convert_raw_data_element(raw, encoding=self._encoding, ds=self.dataset)
            found = _CONVERTED[key] = element, frozenset(doubts)
            if len(_CONVERTED) > _MOST:
                _CONVERTED.popitem(last=False)
        elif found[1]:  # as if converted anew
            repeat(found[1])
        return found[0].value


def syntax_name(syntax: Any) -> str:
    """The standard's name of a transfer syntax."""
    return "private" if syntax.name == syntax else str(syntax.name)


def _tag(name: Any) -> int:
    if name not in _TAGS:
        number = tag_for_keyword(name) if isinstance(name, str) else name
        assert number is not None, name
        _TAGS[name] = int(Tag(number))
    return _TAGS[name]
