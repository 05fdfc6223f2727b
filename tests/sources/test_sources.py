"""Each data set of the catalogue, on a folder of its layout."""

import pytest

from diffusers_dino.data import read_image
from diffusers_dino.data.sources import find_source, open_source, source_names
from scripts import call_script
from source_layouts import LAYOUTS, lay_out


def test_each_source_has_a_layout_here():
    assert sorted(LAYOUTS) == source_names()


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_source_is_read_as_it_is_downloaded(name, tmp_path):
    expected = lay_out(name, tmp_path)
    source = open_source(name, tmp_path)
    records = {record.image_id: record for record in source}
    assert sorted(records) == sorted(expected)
    for image_id, facts in expected.items():
        record = records[image_id]
        assert {key: getattr(record, key) for key in facts} == facts
        assert record.source == name
        assert record.image.is_file()
    assert source.report.records == len(expected)
    assert source.report.missing.count == source.report.repeated.count == source.report.unlisted.count == 0
    assert list(source) == list(records.values()), "not the same again"
    for record in records.values():
        pixels = read_image(record.image, raw=record.raw)
        assert pixels.ndim in (2, 3)
        if record.image.suffix == ".png" and name in ("padchest", "bimcv_covid19", "brax"):
            assert pixels.dtype == "uint16"
        assert all(read_image(mask).ndim in (2, 3) for mask in record.masks)


def test_jsrt_is_the_right_way_round(tmp_path):
    lay_out("jsrt", tmp_path)
    record = next(iter(open_source("jsrt", tmp_path)))
    pixels = read_image(record.image, raw=record.raw)
    assert pixels.shape == (2048, 2048)
    assert pixels[0, 0] > pixels[1024, 0] > pixels[2047, 0]


@pytest.mark.parametrize("name", source_names())
def test_the_catalogue_says_what_people_need(name):
    source = find_source(name)
    assert source.title
    assert source.modality.startswith("CXR")
    assert source.citation
    assert source.url.startswith("http")
    assert source.verified
    assert source.images is None or source.images > 100
    assert set(source.contains) <= set(source_names()) - {name}


def test_the_command_lists_and_describes_sources(capsys):
    call_script("sources")
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == source_names()
    assert listed[source_names().index("padchest")].split() == ["padchest", "160,861", "PadChest"]
    call_script("sources", name="padchest")
    described = capsys.readouterr().out
    for fact in ("PadChest, 160,861 images", "{ImageDir}/{ImageID}", "Licence: PadChest", "Layout checked: "):
        assert fact in described
    with pytest.raises(ValueError, match="Did you mean 'padchest'"):
        call_script("sources", name="padchst")
