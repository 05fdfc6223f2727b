"""Choosing lungs without a reference: what is named, what is stable, and that nothing but the image is used."""

import pytest
import torch

from diffusers_dino.diffseg.lungs import lung_prior, most_agreed, name_lungs, union_table

SIZE = 64


def chest() -> tuple[torch.Tensor, torch.Tensor]:
    """Segments 0 body, 1 and 2 the lungs, 3 dark air outside, and a gray image of them."""
    segments = torch.zeros(SIZE, SIZE, dtype=torch.long)
    segments[:, :4] = segments[:, -4:] = 3
    segments[12:46, 9:27] = 1
    segments[12:46, 37:55] = 2
    image = torch.tensor([0.9, 0.3, 0.3, 0.0])[segments]
    return segments, image


def test_the_prior_is_symmetric_and_off_the_border():
    prior = lung_prior(SIZE)
    assert torch.equal(prior, prior.flip(1))
    assert not prior[[0, -1]].any()
    assert not prior[:, [0, -1]].any()
    assert 0.3 < prior.float().mean() < 0.45


def test_both_lungs_are_named_whatever_their_numbers():
    segments, image = chest()
    found = name_lungs(segments, image)
    assert found.segments == (1, 2)
    assert torch.equal(found.mask, (segments == 1) | (segments == 2))
    renumbered = torch.tensor([7, 0, 4, 2])[segments]
    again = name_lungs(renumbered, image)
    assert again.segments == (0, 4)
    assert again.score == pytest.approx(found.score)


def test_one_segment_may_hold_both_lungs():
    segments, image = chest()
    segments[segments == 2] = 1
    assert name_lungs(segments, image).segments == (1,)
    assert name_lungs(torch.zeros_like(segments), image).segments == (0,)


def test_darkness_decides_between_equal_shapes():
    segments = torch.zeros(SIZE, SIZE, dtype=torch.long)
    segments[:, SIZE // 2 :] = 1
    image = torch.tensor([0.2, 0.8])[segments]
    assert name_lungs(segments, image).segments == (0,)
    assert name_lungs(segments, 1 - image).segments == (1,)
    assert name_lungs(segments, image * 0 + 0.5).mask.any()  # a constant image has nothing dark


def test_images_of_another_size_are_refused():
    segments, image = chest()
    with pytest.raises(ValueError, match=r"\(64, 64\) and \(32, 64\)"):
        name_lungs(segments, image[:32])


def test_the_mask_that_others_agree_with_is_chosen():
    masks = torch.zeros(5, 8, 8, dtype=torch.bool)
    masks[0, :, :] = True
    masks[1:4, 2:6, 2:6] = True
    masks[1, 2, 2], masks[3, 5, 5] = False, False
    assert most_agreed(masks) == 2  # between the two that each lack a pixel; masks 0 and 4 are outliers
    assert most_agreed(masks[:1]) == 0


def test_agreement_needs_masks():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one"):
        most_agreed(masks[:0])
    with pytest.raises(ValueError, match="at least one"):
        most_agreed(masks.float())


def test_a_table_of_unions_sums_what_it_unites():
    table = union_table(torch.tensor([1.0, 10.0, 100.0]))
    assert table.tolist() == [[1, 11, 101], [11, 10, 110], [101, 110, 100]]
