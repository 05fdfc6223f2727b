import pytest

from diffusers_dino.data.sources.fields import (
    Finding,
    LabelRule,
    Template,
    Value,
    combine,
    is_blank,
    normalize_split,
    normalize_view,
)


@pytest.mark.parametrize("cell", ["", "  ", "nan", "NaN", "None", "null", "N/A", " na "])
def test_blanks(cell):
    assert is_blank(cell)
    assert not is_blank(f"{cell}x")


@pytest.mark.parametrize(
    ("cell", "view"),
    [
        ("pa", "PA"),
        ("AP_horizontal", "AP"),
        ("LL", "LATERAL"),
        ("Lateral", "LATERAL"),
        ("Frontal", "FRONTAL"),
        ("UNK", None),
        ("nan", None),
        ("costal", "COSTAL"),
        (" L-MLO ", "L-MLO"),
    ],
)
def test_views(cell, view):
    assert normalize_view(cell) == view


@pytest.mark.parametrize(
    ("cell", "split"),
    [("Train", "train"), ("valid", "validation"), ("dev", "validation"), ("TEST", "test"), ("", None)],
)
def test_splits(cell, split):
    assert normalize_split(cell) == split


def test_templates():
    template = Template("a/{x y}/{z}.png")
    assert template.columns == ("x y", "z")
    assert template.fill({"x y": " 1 ", "z": "2"}) == "a/1/2.png"
    assert template.fill({"x y": "1", "z": "nan"}) == "", "a path with a hole in it is no path"
    assert template.wildcard() == "a/*/*.png"
    assert Template("PA").fill({}) == "PA"
    with pytest.raises(KeyError):
        Template("{missing}").fill({})


def test_values_take_the_first_that_is_not_blank_and_translate_it():
    assert Value(["{a}", "{b}"]).read({"a": "None", "b": "2"}) == "2"
    value = Value({"from": "{a}", "map": {"19": "test", "*": "train"}})
    assert [value.read({"a": cell}) for cell in ("19", "10", "")] == ["test", "train", ""]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("['a', 'b']", ("a", "b")),
        ("['a' 'b']", ("a", "b")),
        ("['COVID 19'\t 'alveolar pattern']", ("COVID 19", "alveolar pattern")),
        ("[\"it's\", 'b', 'b']", ("it's", "b")),
        ("[]", ()),
        ("[a, b]", ("a", "b")),
        ("['__import__(\"os\").abort()']", ('__import__("os").abort()',)),
    ],
)
def test_lists_of_labels_are_read_and_never_run(cell, labels):
    assert LabelRule(column="{x}", list=True).read({"x": cell}).present == labels


def test_columns_of_findings():
    rule = LabelRule(columns=("Edema", "No Finding", "Mass"), none=("No Finding",))
    columns = rule.findings_columns(())
    assert rule.read({"Edema": "1.0", "No Finding": "", "Mass": "-1"}, columns) == Finding(("Edema",), ("Mass",), True)
    assert rule.read({"Edema": "", "No Finding": "1", "Mass": ""}, columns) == Finding((), (), True)
    assert rule.read({"Edema": "", "No Finding": "nan", "Mass": ""}, columns) == Finding()
    with pytest.raises(ValueError, match="'Mass' holds '7'"):
        rule.read({"Edema": "", "No Finding": "", "Mass": "7"}, columns)
    every = LabelRule(columns="*", exclude=("id",))
    assert every.findings_columns(["id", "Edema", "Mass"]) == ("Edema", "Mass")
    words = LabelRule(columns=("Edema",), positive=("Y",), negative=("N",))
    assert words.read({"Edema": "Y"}, ("Edema",)).present == ("Edema",)


def test_a_map_tells_no_finding_from_nothing_said():
    rule = LabelRule(column="{x}", map={"0": [], "1": ["a", "b"]}, unlabelled=("unknown",))
    assert rule.read({"x": "0"}) == Finding((), (), True)
    assert rule.read({"x": "1"}) == Finding(("a", "b"), (), True)
    assert rule.read({"x": "unknown"}) == Finding()
    assert rule.read({"x": ""}) == Finding()
    assert LabelRule(column="{x}", map={"": [], "*": "object"}).read({"x": ""}) == Finding((), (), True)


def test_heads_and_new_names():
    rule = LabelRule(column="{x}", separator="|", head="/", rename={"Opacity": "Lung Opacity"}, none=("normal",))
    assert rule.read({"x": "Opacity/lung|Mass"}).present == ("Lung Opacity", "Mass")
    assert rule.read({"x": "normal"}) == Finding((), (), True)


def test_a_finding_that_two_columns_name_is_not_both_present_and_uncertain():
    rule = LabelRule(columns=["Lung Lesion", "Mass"], rename={"Lung Lesion": "Mass"})
    row = {"Lung Lesion": "1", "Mass": "-1"}
    assert rule.read(row, rule.findings_columns(row)) == Finding(("Mass",), (), True)


def test_more_than_half_of_those_who_say_something_decide():
    one, two, nothing = Finding(("a",), (), True), Finding(("a", "b"), ("c",), True), Finding()
    assert combine([one, two]) == Finding(("a", "b"), ("c",), True)
    assert combine([one, two, Finding((), (), True)], majority=True) == Finding(("a",), (), True)
    assert combine([two, nothing, nothing], majority=True).present == ("a", "b")
    assert combine([one, Finding((), (), True)], majority=True).present == (), "half is not more than half"
    assert combine([nothing, nothing]) == Finding()
