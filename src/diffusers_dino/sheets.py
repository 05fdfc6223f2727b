"""Many images in one picture, to be looked at side by side."""

from __future__ import annotations

import PIL.Image
from diffusers.utils import make_image_grid
from PIL import ImageOps

from .pixels import ImageInput, to_unit, unit_to_uint8

__all__ = ["contact_sheet"]


def contact_sheet(*groups: ImageInput, size: tuple[int, int] | None = None) -> PIL.Image.Image:
    """Lay groups of images out in the rows of one RGB picture, such as sources | paths between them | targets.

    Args:
        groups: The first has one image for each of the N rows. Any other has k images for each, those of a row
            together, which become k columns. Types as in `diffusers_dino.pixels`, sizes may differ.
        size: Width and height of a cell in pixels; by default those of the smallest image. Images are scaled to it,
            cut to its shape around their centre.

    Raises:
        ValueError: If there is no image, or the rows of a group cannot be of equal length.
    """
    units = [to_unit(group) for group in groups]
    if not units:
        raise ValueError("There is no image to lay out.")
    rows = len(units[0])
    for number, group in enumerate(units):
        if len(group) % rows:
            raise ValueError(
                f"Group {number} has {len(group)} images, which do not fill the {rows} rows of the first."
            )
    if size is None:
        height, width = min((unit.shape[-2:] for group in units for unit in group), key=lambda shape: shape.numel())
        size = width, height
    cells = []
    for row in range(rows):
        for group in units:
            columns = len(group) // rows
            for unit in group[row * columns : (row + 1) * columns]:
                picture = PIL.Image.fromarray(unit_to_uint8(unit.detach()).movedim(0, -1).cpu().numpy())
                cells.append(ImageOps.fit(picture, size))
    return make_image_grid(cells, rows, len(cells) // rows)
