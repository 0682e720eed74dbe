from __future__ import annotations

import doctest

import pytest
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from lorasweep.tracking import wording


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(wording).failed == 0


def test_long_values_that_begin_alike_stay_apart() -> None:
    one, two = (wording.param_text("x" * 7000 + ending) for ending in "ab")
    assert len(one) == len(two) == wording.PARAM_CHARACTERS
    assert one != two
    assert "shortened from 7001 characters, sha256" in one


@pytest.mark.parametrize(
    "name", ["f1/très bien!", "a//b", "../up", "/root", "", ".", "x" * 400, "line\nbreak", "a/../b"]
)
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    written = wording.key(name)
    _validate_metric_name(written)
    _validate_param_name(written)
    assert len(written) <= wording.KEY_CHARACTERS


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:ab/cd@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:a?b#c:d@host/db?e=f", "postgresql://me:***@host/db?e=f"),
        ("postgresql://me:p@ss@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@corp:ab@host/db", "postgresql://me@corp:***@host/db"),
        ("sqlite+pysqlcipher://:ab@/file.db", "sqlite+pysqlcipher://:***@/file.db"),
        ("http://me:ab@hub:8000/user/me@x.org", "http://me:***@hub:8000/user/me@x.org"),
        ("http://me:ab/cd@hub", "http://me:***@hub"),
        ("https://me:ab@[::1]:5000", "https://me:***@[::1]:5000"),
        ("postgresql://h/db?user=me&password=ab", "postgresql://h/db?user=me&password=***"),
        ("postgresql://h:1/db?password=a@b&c=d", "postgresql://h:1/db?password=***&c=d"),
        ("mysql://h/db?p%61sswd=ab&charset=utf8", "mysql://h/db?p%61sswd=***&charset=utf8"),
        ("mssql://h/db?PWD=ab", "mssql://h/db?PWD=***"),
        ("https://h/?access_token=ab%3D", "https://h/?access_token=***"),
        (
            "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D%7Bab%3Bcd%7D&e=f",
            "mssql+pyodbc:///?odbc_connect=***&e=f",
        ),
    ],
)
def test_secrets_are_taken_out_of_uris(uri: str, shown: str) -> None:
    assert wording.redacted(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite",
        "./runs/me@x.org",
        "C:\\Users\\me@x.org\\mlruns",
        "file:///C:/Users/me@x.org",
        "sqlite:///C:/Users/me@x.org/mlflow.db",
        "sqlite:////home/me@x.org/a:b@c/mlflow.db",
        "postgresql://me@host:5432/db?sslmode=require",
        "https://hub:8000/user/me@x.org/mlflow",
        "https://me@hub:8000",
        "https://hub/user/me@x.org:1",
        "http://[::1]:5000/me@x.org",
        "databricks://profile",
    ],
)
def test_uris_without_secrets_are_left_as_they_are(uri: str) -> None:
    assert wording.redacted(uri) == uri


def test_names_that_lose_their_difference_stay_apart() -> None:
    assert wording.key("f1/ä") != wording.key("f1/ö")
    assert wording.key("val_f1") == "val_f1"
