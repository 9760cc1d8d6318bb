"""What belongs to an image, brought to its grid: its mask, and the xyz beside a picture."""

from dataclasses import replace

from medssl.data.image import Image, PointCloud
from medssl.data.readers.errors import InconsistentGeometryError, UnsupportedFormatError


def on_image(mask: Image, image: Image) -> Image:
    """A mask of zeros and ones in the frame of `image`.

    A mask without a frame of its own (a picture) must have the image's shape and lies on its grid.

    Raises InconsistentGeometryError where it has another shape, or a frame that is not the image's.
    """
    marked = (mask.pixels > 0).any(dim=0, keepdim=True).float()  # (1, *axes)
    mask = replace(mask, pixels=marked, value_range=(0.0, 1.0), channels=(), units="mask")
    if mask.frame == "pixel":
        if mask.spatial_shape != image.spatial_shape:
            raise InconsistentGeometryError(
                f"its mask has the size {mask.spatial_shape} and the image {image.spatial_shape}; "
                "draw the mask on the image's own grid"
            )
        return replace(mask, affine=image.affine, frame=image.frame, spacing=image.spacing)
    if mask.frame != image.frame:
        raise InconsistentGeometryError(
            f"its mask lies in the {mask.frame} frame and the image in the {image.frame} frame; "
            "save the mask in the geometry of the image"
        )
    return mask


def beside(xyz: Image | PointCloud, picture: Image) -> Image:
    """The geometry of a picture, found to lie on its grid: (3, H, W) x, y, z.

    Raises UnsupportedFormatError where it is not organized, and InconsistentGeometryError where it
    has another shape than the picture.
    """
    if not isinstance(xyz, Image) or xyz.channels != ("x", "y", "z"):
        got = f"an image of {len(xyz.pixels)} channels" if isinstance(xyz, Image) else "free points"
        raise UnsupportedFormatError(
            f"the xyz beside its picture must be organized, in three float channels; got {got}"
        )
    if xyz.spatial_shape != picture.spatial_shape:
        raise InconsistentGeometryError(
            f"its xyz has the size {xyz.spatial_shape} and its picture {picture.spatial_shape}; "
            "bring the picture to the pixels of the depth camera"
        )
    return xyz
