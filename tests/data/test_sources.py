"""Files and Hub folders: every cell as written, every fault with its line."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import datasets
import pytest

from lorasweep.core.errors import DataError, StorageError
from lorasweep.data.files import read_file
from lorasweep.data.sources import describe_source, read_source
from lorasweep.spec.schema import DataSpec

WORDS = ["nan", "null", "NA", "None", "007", "1e5", "True", "2020-01-01", "", " x ", "a\x00b"]


def spec(**values: object) -> DataSpec:
    return DataSpec.model_validate(values)


def files(train: Path, **values: object) -> DataSpec:
    return spec(source={"kind": "files", "train": str(train)}, **values)


def told(path: Path | str, text: str = "text", label: str = "label") -> list[str]:
    """What is said of a file that can't be used."""
    with pytest.raises(DataError) as caught:
        read_file(str(path), text, label)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


# ------------------------------------------------------------------ text stays text


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_separated_cells_come_as_written(
    tmp_path: Path, newline: str, mark: str, ending: str, separator: str
) -> None:
    extra = [*WORDS, 'say ""this""', f"one{newline}two", f"a{separator}b", "房间", "x" * 200_000]
    lines = [separator.join(["id", "label", "text"])]
    lines += [f'{at}{separator}"{at % 2}"{separator}"{cell}"' for at, cell in enumerate(extra)]
    path = tmp_path / f"some.{ending}"
    path.write_bytes((mark + newline.join(lines) + newline).encode())
    table = read_file(str(path), "text", "label")
    assert table.texts == tuple(cell.replace('""', '"') for cell in extra)
    assert table.labels == tuple(str(at % 2) for at in range(len(extra)))
    assert table.stem == "some"


def test_unquoted_words_are_no_missing_values(tmp_path: Path) -> None:
    words = [word for word in WORDS if word]
    path = tmp_path / "some.csv"
    path.write_text("text,label\n" + "".join(f"{word},nan\n" for word in words), encoding="utf-8")
    table = read_file(str(path), "text", "label")
    assert table.texts == tuple(words)
    assert set(table.labels) == {"nan"}


def test_lines_count_embedded_newlines_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text('text,label\n"a\nb",1\n\nc,0\n', encoding="utf-8")
    assert read_file(str(path), "text", "label").places == (2, 5)


def test_json_lines_keep_types_and_strings_that_look_like_dates(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    rows = [
        {"text": word, "label": label}
        for word, label in zip([*WORDS, "a\u2028b"], [1, True, "a", None] * 3, strict=True)
    ]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\ufeff" + content, encoding="utf-8")
    table = read_file(str(path), "text", "label")
    assert table.texts == (*WORDS, "a\u2028b")
    assert [type(label) for label in table.labels[:4]] == [int, bool, str, type(None)]
    assert table.places[:2] == (1, 3)


def test_parquet_carries_types_and_class_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"text": ["NA", "b"], "label": [1, -1]}, features=features)
    table.to_parquet(tmp_path / "some.parquet")
    read = read_file(str(tmp_path / "some.parquet"), "text", "label")
    assert (read.texts, read.labels, read.class_names) == (("NA", "b"), (1, None), ("bad", "good"))


def test_a_changed_file_is_read_anew_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = tmp_path / "some.csv"
    stamp = None
    for text in ("one", "two"):
        path.write_text(f"text,label\n{text},1\n", encoding="utf-8")
        stamp = stamp or path.stat()
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # within the clock's tick
        assert read_file(str(path), "text", "label").texts == (text,)
    assert not cache.exists()
    assert not list(temporary.iterdir())
    assert capfd.readouterr().err == ""  # no progress bars


# ------------------------------------------------------------------ what is wrong


def test_faults_of_files_are_told_with_advice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").write_text("", encoding="utf-8")
    (tmp_path / "header.csv").write_text("text,label\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "wide.csv").write_bytes("text,label\nä,1\n".encode("utf-16"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "Did you mean 'train.csv'?" in told(tmp_path / "trian.csv")[0]
    assert "neither does the folder" in told(tmp_path / "no" / "train.csv")[0]
    assert "is a folder" in told(tmp_path)[0]
    assert "is empty" in told(tmp_path / "train.csv")[0]
    assert "has a header but no rows" in told(tmp_path / "header.csv")[0]
    assert ".jsonl" in told(tmp_path / "notes.txt")[0]
    assert "UTF-16" in told(tmp_path / "wide.csv")[0]
    assert "can't be read as Parquet" in told(tmp_path / "broken.parquet")[0]
    assert capfd.readouterr().err == ""  # `datasets` doesn't log what we tell


def test_undecodable_bytes_are_told_by_line_whatever_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_bytes(b"text,label\r\na,1\rb\xff,0\nc,1\n\xe9,1\n")
    (problem,) = told(path)
    assert problem.startswith(f"{path}:3: ")
    assert "lines 3 and 5" in problem
    assert "0xff at byte 2 of line 3" in problem


def test_missing_columns_list_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("Text,lable\na,1\n", encoding="utf-8")
    text, label = told(path)
    assert "its columns are 'Text', 'lable'. Did you mean 'Text'?" in text
    assert "Did you mean 'lable'?" in label


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("text,label,label\na,1,0\n", encoding="utf-8")
    assert "names the label column 'label' 2 times" in told(path)[0]


def test_another_separator_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("text;label\na;1\n", encoding="utf-8")
    (problem,) = told(path)
    assert "the header has no ',', but ';'" in problem


def test_ragged_rows_and_quotes_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text(
        'text,label\na,1\nb\nc,0,x\n"d\ne",1,1\n"f" g,1\nh\n"never closed,1\nx,1\n',
        encoding="utf-8",
    )
    problems = told(path)
    assert any(":7: " in problem and "unbalanced quote" in problem for problem in problems)
    assert any(":9: " in p and "swallows the lines up to 10" in p for p in problems)
    assert any("2 rows with fewer fields" in p and "lines 3 and 8" in p for p in problems)
    assert any("2 rows with more fields" in p and "lines 4 and 5" in p for p in problems)


def test_a_quote_that_swallows_lines_is_found(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text('text,label\n"oops,1\nfine,0\n"so what",1\nlast,0\n', encoding="utf-8")
    (problem,) = told(path)
    assert f"{path}:2: " in problem
    assert "swallows the lines up to 4" in problem


def test_json_faults_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = [
        '{"text": "a", "label": 1}',
        '{"text": "cut off',
        "[1]",
        '{"text": null, "label": 1}',
        '{"label": 1}',
        '{"text": 5, "label": 1}',
        '{"text": "\\ud800", "label": 1}',
        '{"text": "b", "label": [1]}',
        '{"text": null, "label": 0}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    problems = "\n".join(told(path))
    for line, what in (
        (2, "isn't JSON"),
        (3, "expected an object"),
        (4, "is null (lines 4 and 9)"),
        (5, "no text 'text'"),
        (6, "not a string"),
        (7, "surrogate"),
        (8, "list or an object"),
    ):
        assert any(f"{path}:{line}: " in p and what in p for p in problems.split("\n")), what
    path.write_text('[{"text": "a", "label": 1}]', encoding="utf-8")
    assert "JSON list" in told(path)[0]


def test_parquet_text_must_be_text_and_there(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    datasets.Dataset.from_dict({"text": [1, 2], "label": [[1], [2]]}).to_parquet(path)
    text, label = told(path)
    assert "holds int64, expected text" in text
    assert "expected one label a text" in label
    datasets.Dataset.from_dict({"text": ["a", None], "label": [1, 2]}).to_parquet(path)
    assert f"{path} row 2: " in told(path)[0]
    assert "has no text column 'body'" in told(path, text="body")[0]


def test_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n", encoding="utf-8")
    source = {"kind": "files", "train": str(tmp_path / "a.csv"), "test": str(tmp_path / "b.csv")}
    with pytest.raises(DataError) as caught:
        read_source(spec(source=source), 1)
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match="both name the column 'text'"):
        read_source(spec(source=source, label="text"), 1)


# ------------------------------------------------------------------ the Hub's layout


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A data set as the Hub lays it out: Parquet shards, configurations in the README."""
    folder = tmp_path / "reviews"
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    for config in ("short", "long"):
        for split in ("train", "validation"):
            rows = {"sentence": [f"{config} {split} {n}" for n in range(4)], "label": [0, 1, 0, 1]}
            shard = folder / config / f"{split}-00000-of-00001.parquet"
            shard.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(shard)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n"
            f"  - {{split: train, path: {config}/train-*}}\n"
            f"  - {{split: validation, path: {config}/validation-*}}\n"
            for config in ("short", "long")
        )
        + "---\n",
        encoding="utf-8",
    )
    return folder


def hub(folder: Path, **values: object) -> DataSpec:
    return spec(source={"kind": "hub", "path": str(folder), **values}, text="sentence")


def test_a_folder_in_hub_layout(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    wanted = hub(hub_folder, config="short", test="validation")
    tables = read_source(wanted, 1)
    assert tables["train"].texts[0] == "short train 0"
    assert tables["test"].stem == "validation"
    assert tables["train"].class_names == ("neg", "pos")
    assert describe_source(wanted)[0] == "reviews"
    changed = datasets.Dataset.from_dict({"sentence": ["new"], "label": [1]})
    changed.to_parquet(hub_folder / "short" / "train-00000-of-00001.parquet")
    assert read_source(wanted, 1)["train"].texts == ("new",)
    assert not (tmp_path / "cache").exists()
    sliced = read_source(hub(hub_folder, config="long", train="train[:2]"), 1)
    assert len(sliced["train"]) == 2


def test_what_a_hub_data_set_lacks_is_told_once(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def told_of(**values: object) -> str:
        with pytest.raises(DataError) as caught:
            read_source(hub(hub_folder, **values), 1)
        (problem,) = caught.value.problems
        return str(problem)

    assert "Did you mean 'short'?" in told_of(config="shrot", test="validation")
    assert "one of short, long" in told_of(test="validation").replace("long, short", "short, long")
    missing = told_of(config="short", test="test")
    assert "has no split 'test'" in missing
    assert "train, validation" in missing
    assert not (tmp_path / "cache").exists()


def test_a_hub_data_set_out_of_reach_is_a_sentence(tmp_path: Path) -> None:
    for path, what in (("nobody/nothing", "can't be loaded"), ("./nothing", "is no folder")):
        with pytest.raises(DataError, match=what):
            read_source(spec(source={"kind": "hub", "path": path}), 1)


def test_without_a_temporary_folder_there_is_a_sentence(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "some.csv"
    table.write_text("text,label\ngood film,1\nbad film,0\n", encoding="utf-8")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    for source in (files(table), hub(hub_folder)):
        with pytest.raises(StorageError, match="set TMPDIR to a folder that can be written"):
            read_source(source, 1)


def test_a_csv_on_the_hub_that_pandas_emptied_is_not_taken_silently(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nnull,1\nb,0\n", encoding="utf-8")
    with pytest.raises(DataError, match="kind: files, which keeps them"):
        read_source(spec(source={"kind": "hub", "path": str(tmp_path)}), 1)


def test_the_generated_corpus_has_tags_and_a_test_split() -> None:
    tables = read_source(spec(source={"kind": "embedded", "size": 200}), 7)
    assert set(tables) == {"train", "test"}
    assert tables["train"].class_names == ("negative", "positive")
    assert len(tables["train"].tags) == len(tables["train"])


# ------------------------------------------------------------------ real nasty files


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "text", "label", "rows", "lines"),
    [
        ("ChnSentiCorp_htl_all.csv", "review", "label", 7766, None),
        ("bom_utf8.csv", "text", "label", 300, None),
        ("cr_only.csv", "text", "label", 200, None),
        ("good.jsonl", "text", "label", 300, None),
        ("isarcasm_task_A_En_test_embedded_newlines.csv", "text", "sarcastic", 1400, None),
        ("naughty_strings.csv", "text", "label", 515, None),
        ("very_long_texts.csv", "text", "label", 100, None),
        ("header_only.csv", "text", "label", None, "has a header but no rows"),
        ("invalid_utf8.csv", "text", "label", None, ":52: bytes that aren't UTF-8"),
        ("missing_label_column.csv", "text", "label", None, "has no label column 'label'"),
        ("ragged_rows.csv", "text", "label", None, ":23: 1 row with fewer fields"),
        ("ragged_rows.csv", "text", "label", None, ":22: 1 row with more fields"),
        ("bad_line.jsonl", "text", "label", None, ":51: isn't JSON"),
        ("bad_line.jsonl", "text", "label", None, ":54: the text 'text' is null"),
    ],
)
def test_nasty_files(
    real_data: Path, name: str, text: str, label: str, rows: int | None, lines: str | None
) -> None:
    path = real_data / "nasty" / name
    if rows is None:
        assert lines is not None
        assert lines in "\n".join(told(path, text, label))
        return
    table = read_file(str(path), text, label)
    assert len(table) == rows
    if name == "naughty_strings.csv":
        assert {"null", "NULL", "None", "NaN", "1E2", "-0", "true"} <= set(table.texts)
    if name == "very_long_texts.csv":
        assert max(map(len, table.texts)) >= 1_000_000
    if name.startswith("isarcasm"):
        assert any("\n" in one for one in table.texts)
