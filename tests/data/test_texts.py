import pytest

from lorasweep.core.errors import DataError
from lorasweep.data.texts import read_texts, split_texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.txt", "one, two\r\n\r\nNA\n"),
        ("in.csv", 'id,body\n1,"one, two"\n2,NA\n'),
        ("in.tsv", "id\tbody\n1\tone, two\n2\tNA\n"),
        ("in.jsonl", '{"body": "one, two"}\n{"body": "NA"}\n'),
    ],
)
def test_every_format_gives_the_texts_as_they_are(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8-sig", newline="")
    assert read_texts(str(path), "body") == (["one, two", "NA"], name == "in.txt")


def test_a_line_ends_where_a_line_ends_and_nowhere_else():
    content = "\ufeffa\x0cb\u2028c\x85d\re\r\n\r\n \nf".encode()
    assert split_texts("stdin", content) == (["a\x0cb\u2028c\x85d", "e", "f"], 2)


def test_bytes_that_are_no_text_are_told_with_their_line():
    with pytest.raises(DataError, match="stdin:2: bytes that aren't UTF-8"):
        split_texts("stdin", b"a\nb \xff\n")


def test_what_is_wrong_is_told_once(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("id,body\n1,x\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_texts(str(path), "bdy")
    assert len(caught.value.problems) == 1
    assert "body" in str(caught.value)
    assert "data.text" not in str(caught.value)  # there is no spec to name it in


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="is a folder") as caught:
        read_texts(str(tmp_path), "text")
    assert "hub" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "\n \n"), ("a.csv", ""), ("a.doc", "x")])
def test_a_file_without_texts_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError):
        read_texts(str(path), "text")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_texts(str(tmp_path / "nowhere.txt"), "text")
