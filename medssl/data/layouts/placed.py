"""The layout of a folder, by its shape, and what it says of the images."""

from pathlib import Path

from medssl.data.layouts.eyecandies import is_eyecandies, place_eyecandies
from medssl.data.layouts.mvtec_3d import is_mvtec_3d, place_mvtec_3d
from medssl.data.layouts.mvtec_ad import is_mvtec_ad, place_mvtec_ad
from medssl.data.layouts.plain import Listing
from medssl.data.layouts.real3d import is_real3d, place_real3d
from medssl.data.layouts.reports_csv import is_reports_csv, place_reports_csv
from medssl.data.layouts.rgb_xyz import place_rgb_xyz


def placed(root: Path, listing: Listing) -> Listing:
    """The images of a folder as its layout says; of any other folder, with xyz tied to pictures.

    Raises ValueError where a folder contradicts its layout.
    """
    if is_mvtec_3d(root):  # first: its train/good is there in MVTec AD too
        return place_mvtec_3d(root, listing)
    if is_mvtec_ad(root):
        return place_mvtec_ad(root, listing)
    if is_eyecandies(root):
        return place_eyecandies(root, listing)
    if is_real3d(root):
        return place_real3d(root, listing)
    if is_reports_csv(root):
        return place_reports_csv(root, listing)
    return place_rgb_xyz(listing)
