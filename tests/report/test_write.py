from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorasweep.core.engine_use import EngineUse
from lorasweep.core.errors import InputError, StorageError
from lorasweep.evaluation.predictions import read_predictions
from lorasweep.report import plots, write
from lorasweep.report.collect import collect
from lorasweep.report.html_report import page as html_page
from lorasweep.report.write import FIGURES, write_report

ALL = {
    "fine_tuning_results.json", "predictions.csv", "hyperparameter_comparison.png",
    "learning_curves.png", "confusion_matrix.png", "before_after.png", "model_card.md",
    "index.html",
}  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def written_page(sweep) -> Page:  # type: ignore[no-untyped-def]
    """The page alone, with stand-ins for its figures, which take their time to draw."""
    return Page(html_page(collect(sweep), dict.fromkeys(FIGURES, b"png")))


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One figure that depends on the test split in place of all four."""
    monkeypatch.setattr(write, "FIGURES", {"confusion_matrix.png": plots.confusion_matrix})


@pytest.fixture
def page(make_sweep) -> Page:  # type: ignore[no-untyped-def]
    return written_page(make_sweep(openings=2, leaked=9))


def test_all_documents_are_there_and_name_each_other(make_sweep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "deep" / "report"
    sweep = make_sweep()
    assert write_report(sweep, out) == out / "index.html"
    assert names_in(out) == ALL
    found = json.loads((out / "fine_tuning_results.json").read_text("utf-8"))
    models, texts = read_predictions(out / found["predictions_file"], sweep.corpus.label_names)
    assert [one.model for one in models] == ["finetuned", "untrained", "majority", "tfidf"]
    assert texts == sweep.corpus.test.texts
    assert (models[0].probabilities == sweep.test["finetuned"].probabilities).all()
    # The documents depend on the sweep only.
    write_report(make_sweep(), tmp_path / "again")
    for name in ALL:
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.usefixtures("quick_figures")
def test_a_new_report_leaves_no_trace_of_the_old_one(make_sweep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine.txt").write_text("keep")
    write_report(make_sweep(), tmp_path)
    both = {"fine_tuning_results.json", "index.html", "model_card.md", "mine.txt"}
    assert names_in(tmp_path) == both | {"predictions.csv", "confusion_matrix.png"}
    write_report(make_sweep(test_rows=None, samples=()), tmp_path)
    assert names_in(tmp_path) == both


@pytest.mark.parametrize("name", ["index.html", "predictions.csv"])
def test_files_that_no_report_wrote_are_not_replaced(  # type: ignore[no-untyped-def]
    name: str, make_sweep, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, which no report wrote"):
        write_report(make_sweep(), tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert names_in(tmp_path) == {name}


@pytest.mark.usefixtures("quick_figures")
def test_an_error_leaves_the_old_report_whole(  # type: ignore[no-untyped-def]
    make_sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(make_sweep(), tmp_path)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object) -> str:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(write, "page", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        write_report(make_sweep(trials=3), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_a_folder_that_cannot_be_written_is_said(make_sweep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="can't be written"):
        write_report(make_sweep(), tmp_path / "file" / "report")


def test_texts_are_escaped_and_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "b", "link", "iframe"}
    assert "<script>alert('x')</script> & <b>bold</b> costs $5 or $6_000" in page.text
    assert "the loss is <NaN>" in page.text
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 4
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert not any("href" in attrs for _, attrs in page.tags)


def test_the_page_tells_what_was_found(page: Page) -> None:
    for part in (
        "It beats the strongest baseline, tfidf",
        "for 2 different winners",
        "On validation, 9 of 200 texts (4.5%)",
        "behind the others",
        "50 fewer than 3 words",
        "2 texts occur with different labels",
        "przepiękny film, 素晴らしい 😀",
        "f" * 64,
        "packages torch",
    ):
        assert part in page.text, part


def test_all_errors_are_on_the_page(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    ours = sweep.test["finetuned"]
    wrong = [ours.ids[row] for row in (ours.predicted != ours.labels).nonzero()[0]]
    text = written_page(sweep).text
    assert len(wrong) > 20
    assert all(f" {name} " in f"{text} " for name in wrong)
    assert f"All {len(wrong)} errors" in text


@pytest.mark.usefixtures("quick_figures")
def test_no_p_value_is_printed_as_zero(make_sweep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(test_rows=4000, skills={"finetuned": 1.0, "untrained": 0.0})
    write_report(sweep, tmp_path)
    page = Page((tmp_path / "index.html").read_text("utf-8")).text
    for text in (page, (tmp_path / "model_card.md").read_text("utf-8")):
        assert "e-" in text or "< 1e-300" in text
        assert not re.search(r"\bp\s*[=<]\s*0(?:\.0+)?(?![.\d])", text)


def test_a_sweep_without_a_test_split_says_so(make_sweep) -> None:  # type: ignore[no-untyped-def]
    text = written_page(make_sweep(test_rows=None)).text
    assert "The spec names no test split" in text
    assert "Where it is wrong" not in text


@pytest.mark.usefixtures("quick_figures")
def test_lone_surrogates_do_not_lose_the_report(make_sweep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    samples = (("a\ud800b", (0.2, 0.8), (0.7, 0.3)),)
    text = write_report(replace(sweep, samples=samples), tmp_path).read_text("utf-8")
    assert "a\\ud800b" in text
    found = json.loads((tmp_path / "fine_tuning_results.json").read_text("utf-8"))
    assert found["before_after"][0]["text"] == "a\ud800b"


@pytest.mark.usefixtures("quick_figures")
def test_the_model_card_has_a_head_scores_and_limits(make_sweep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from ruamel.yaml import YAML

    sweep = make_sweep(leaked=9, base={"name": 'odd: "path"', "digest": "d", "architecture": "b"})
    write_report(sweep, tmp_path)
    card = (tmp_path / "model_card.md").read_text("utf-8")
    _, head, body = card.split("---\n", 2)
    found = YAML(typ="safe").load(head)
    assert found["base_model"] == 'odd: "path"'
    assert found["pipeline_tag"] == "text-classification"
    assert "| tfidf | 0." in body
    assert "On validation, 9 of 200 texts" in body
    assert "| num\\_train\\_epochs | 2 |" in body


def test_the_page_says_how_the_trials_were_trained(make_sweep) -> None:  # type: ignore[no-untyped-def]
    uses = (
        EngineUse("packed, 4 lanes", 7, 4, 2, 150_000_000, 50, 150, 50, 900, 1000, 40.0, 34.0),
        EngineUse("trainer (<b>why</b>)", 1, 1),
    )
    text = written_page(make_sweep(engine_uses=uses)).text
    assert "packed, 4 lanes 7 4 3.0 75.0% 85.0% 90.0% 143 MiB 2" in text
    assert "trainer (<b>why</b>) 1 1 – – – – – –" in text
    assert "on a CPU without the compiled allocator it is counted" in text
    assert "trials that were trained together shared it" in text
    assert "How the trials were trained" not in written_page(make_sweep()).text
