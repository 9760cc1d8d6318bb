"""A whole study of head-CT phantoms on disk, in the folder layout of MVTec AD.

    train/good/<case>/*.dcm
    test/good/<case>/*.dcm
    test/lesion/<case>/*.dcm
    ground_truth/lesion/<case>_mask.nii.gz      on the grid of its series

A case is `case_<seed>`. One series in three is compressed: four of five of those as JPEG-LS, which
is the faster to write and to read, the fifth as JPEG 2000.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from medssl.data.image import Image
from medssl.data.synthetic.dicom_series import Syntax, write_dicom_series
from medssl.data.synthetic.head_ct import head_ct
from medssl.data.writers.nifti import write_nifti


def write_head_ct_study(
    root: Path,
    *,
    train: Sequence[int],
    test_normal: Sequence[int],
    test_lesion: Sequence[int],
    written: Callable[[], None] = lambda: None,
) -> None:
    """Write the phantoms of these seeds under `root`.

    written: called after each case, for a progress bar. Raises ValueError where a seed would lie on
    both sides of the split: with or without a lesion, it is the same head.
    """
    seeds = [*train, *test_normal, *test_lesion]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{len(seeds)} cases share {len(set(seeds))} seeds; a seed is one head and may be used "
            "once"
        )
    for place, chosen in (("train/good", train), ("test/good", test_normal)):
        for seed in chosen:
            _write_case(root / place, seed, head_ct(seed, lesion=False).image)
            written()
    masks = root / "ground_truth/lesion"
    masks.mkdir(parents=True, exist_ok=True)
    for seed in test_lesion:
        phantom = head_ct(seed, lesion=True)
        assert phantom.mask is not None
        _write_case(root / "test/lesion", seed, phantom.image)
        write_nifti(phantom.mask, masks / f"{case_name(seed)}_mask.nii.gz", dtype="uint8")
        written()


def case_name(seed: int) -> str:
    """The folder of a seed's series."""
    return f"case_{seed:05d}"


def _write_case(place: Path, seed: int, image: Image) -> None:
    write_dicom_series(
        image,
        place / case_name(seed),
        name=case_name(seed),
        syntax=_syntax(seed),
        stored="signed16" if seed % 3 == 1 else "unsigned12",
    )


def _syntax(seed: int) -> Syntax:
    if seed % 3:
        return "uncompressed"
    return "jpeg_2000" if seed % 15 == 0 else "jpeg_ls"
