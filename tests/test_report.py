"""The report is one file that shows what it was given."""

import re

import pytest
from PIL import Image

from diffusers_dino.evaluation.figures import plot_loss
from diffusers_dino.report import Report
from folders import full_disk


def test_report_is_self_contained_and_escapes_its_text(tmp_path):
    report = Report("a < b")
    report.add_heading("Figures & more")
    report.add_text("<script>alert(1)</script>")
    report.add_table(["name", "value"], [["x", 0.123456], ["n", 64]])
    report.add_image(Image.new("L", (4, 4), 128), "a picture")
    report.add_figure(plot_loss([1, 2, 3], [3.0, 2.0, 1.0]), "a curve")
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<td>0.123</td>" in page
    assert "<td>64</td>" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert [source.split(";")[0] for source in sources] == ["data:image/png", "data:image/svg+xml"]


def test_a_full_disk_leaves_the_page_of_before(tmp_path):
    path = tmp_path / "report.html"
    Report("before").save(path)
    before = path.read_bytes()
    after = Report("after")
    after.add_text("x" * 10_000)
    with full_disk(len(before)), pytest.raises(OSError, match="too large"):
        after.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_table_rows_must_fit_the_header():
    with pytest.raises(ValueError, match="2 cells"):
        Report("t").add_table(["a", "b"], [["only one"]])


def test_loss_curve_draws_the_losses_and_their_mean():
    axes = plot_loss(range(1, 5), [4.0, 3.0, 2.0, 1.0], window=2).axes[0]
    raw, mean = (line.get_ydata().tolist() for line in axes.lines)
    assert raw == [4, 3, 2, 1]
    assert mean == [4, 3.5, 2.5, 1.5]
    with pytest.raises(ValueError, match="at least one"):
        plot_loss([], [])
