"""The contact sheet: order, sizes, and what it refuses."""

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_dino.sheets import contact_sheet


def shades(*values: float, size: int = 8) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, size, size)


def test_groups_become_columns_and_the_images_of_a_row_stay_together():
    sheet = contact_sheet(shades(0.0, 1.0), shades(0.2, 0.4, 0.6, 0.8), shades(1.0, 0.0))
    assert sheet.mode == "RGB"
    assert sheet.size == (4 * 8, 2 * 8)
    centres = np.array(sheet)[4::8, 4::8, 0] / 255
    np.testing.assert_allclose(centres, [[0, 0.2, 0.4, 1], [1, 0.6, 0.8, 0]])


def test_images_of_any_type_and_size_get_the_size_of_the_smallest():
    wide = PIL.Image.new("L", (100, 40), 0)
    wide.paste(255, (30, 0, 70, 40))  # its central square
    sheet = contact_sheet(wide, [np.full((16, 16, 3), 51, np.uint8)])
    assert sheet.size == (32, 16)
    assert sheet.getpixel((1, 8)) == (255, 255, 255)
    assert sheet.getpixel((30, 8)) == (51, 51, 51)
    assert contact_sheet(wide, size=(20, 10)).size == (20, 10)


def test_rows_that_cannot_be_filled_are_refused():
    with pytest.raises(ValueError, match="Group 1 has 3 images, which do not fill the 2 rows"):
        contact_sheet(shades(0.0, 1.0), shades(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="no image"):
        contact_sheet()
