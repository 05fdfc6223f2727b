"""Files of keys as people write them, and keys that are spelt in another way than the data set spells them."""

import unicodedata

import pytest

from diffusers_dino.data.keys import find_keys, match_keys, match_paths, read_keys

KEYS = ["a", "b c", "Müller/01"]


@pytest.mark.parametrize(
    "content",
    [
        "a\nb c\nMüller/01".encode(),
        "a\r\nb c\r\nMüller/01\r\n".encode(),
        "\ufeffa\n\n  \nb c \n\tMüller/01\n\n".encode(),
        "\ufeffa\nb c\nMüller/01\na\n".encode("utf-16-le"),
        "\ufeffa\rb c\rMüller/01\r".encode("utf-16-be"),
    ],
    ids=["plain", "windows", "blank lines and mark", "utf-16", "old mac, big-endian"],
)
def test_files_of_keys(tmp_path, content):
    (tmp_path / "keys.txt").write_bytes(content)
    assert read_keys(tmp_path / "keys.txt") == KEYS


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf", "Müller".encode("latin-1")])
def test_files_without_keys_or_of_another_encoding_are_refused(tmp_path, content):
    (tmp_path / "keys.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"keys\.txt (holds no key|is not a text file in UTF-8)"):
        read_keys(tmp_path / "keys.txt")


def test_a_key_keeps_signs_that_only_python_takes_for_line_breaks(tmp_path):
    (tmp_path / "keys.txt").write_text("a\x1cb\nc\u2028d\n", encoding="utf-8")
    assert read_keys(tmp_path / "keys.txt") == ["a\x1cb", "c\u2028d"]


@pytest.mark.parametrize(
    "spelt",
    [
        "Müller/01.png",
        "Müller\\01.PNG",
        ".\\Müller\\01",
        "./Müller/01.dcm",
        " Müller/01 ",
        unicodedata.normalize("NFD", "Müller/01"),
        unicodedata.normalize("NFD", "Müller\\01.jpeg"),
    ],
)
def test_other_spellings_of_a_key_lead_to_it(spelt):
    assert match_keys(["a", spelt], KEYS) == [0, 2]
    assert match_keys([KEYS[2]], [spelt]) == [0]


def test_numbers_that_a_spreadsheet_wrote_with_a_point():
    assert match_keys(["1", "2", "30"], ["30.0", "1.0", "2.00"]) == [1, 2, 0]
    assert match_keys(["1.0", "1.5"], ["1", "1.5"]) == [0, 1]
    assert match_keys(["1.2.840.0"], ["1.2.840"]) == [None]


@pytest.mark.parametrize(
    ("wanted", "known", "places"),
    [
        (["a"], ["a.png", "a.jpg"], [None]),
        (["a.png", "a.jpg"], ["a"], [None, None]),
        (["a.png", "a"], ["a"], [None, 0]),
        (["1.0", "1.00"], ["1"], [None, None]),
        (["a\\b"], ["a/b", "a\\b"], [1]),
        (["A", "001", "/data/a", "a.mask.png"], ["a", "1"], [None] * 4),
        (["a", "a", "a.png"], ["a"], [0, 0, None]),
    ],
)
def test_what_could_mean_several_is_not_guessed(wanted, known, places):
    assert match_keys(wanted, known) == places


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("/data/Müller/01.png", "Müller/01"),
        (r"C:\cxr\a.png", "'a'"),
        ("A.PNG", "'a'"),
        ("001", "'1'"),
        ("B C", "'b c'"),
    ],
)
def test_a_key_that_is_nearly_there_is_hinted_at(key, meant):
    with pytest.raises(KeyError, match=f"1 keys are lost, such as .* \\(is .*{meant}.* meant by"):
        find_keys([key, "a"], [*KEYS, "1"], "keys are lost")


@pytest.mark.parametrize(
    "spelt", ["/data/cxr/Müller/01.png", "C:\\data\\Müller\\01.dcm", "01.png", "s3://bucket/Müller/01.jpg", "01"]
)
def test_paths_and_names_of_files_lead_to_a_key(spelt):
    assert match_paths(["a", spelt, "nobody"], KEYS) == [0, 2, None]
    assert match_paths([unicodedata.normalize("NFD", spelt)], KEYS) == [2]


def test_a_name_that_may_be_several_keys_is_not_guessed():
    known = ["p1/view", "p2/view", "other"]
    assert match_paths(["/data/p2/view.png", "/data/p3/view", "p3/view.png"], known) == [1, None, None]
    with pytest.raises(ValueError, match=r"'view.png' may be 2 of the images, such as 'p1/view' or 'p2/view'"):
        match_paths(["other", "view.png"], known)


def test_an_unknown_key_is_told_without_quotes_or_traceback(tmp_path):
    with pytest.raises(KeyError, match=r"^2 keys are missing, such as nobody, no one$") as caught:
        find_keys(["a", "nobody", "no one"], KEYS, "keys are missing")
    assert isinstance(caught.value, ValueError)  # which commands end with one line for
