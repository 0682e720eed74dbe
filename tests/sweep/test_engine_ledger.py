"""What each command's engine did is kept, whatever happened to the command."""

import json
import os

import pytest

from lorasweep.core.engine_use import EngineUse
from lorasweep.core.errors import StorageError
from lorasweep.sweep.engine_ledger import keep, kept, metrics, sentence

PACKED = EngineUse(
    "packed, 4 lanes", 7, 4, 1, 150_000_000, pack_steps=50, lane_steps=150, empty_places=50,
    tokens=900, computed_tokens=1000, seconds=40.0, step_seconds=35.0,
)  # fmt: skip
TRAINER = EngineUse("trainer (too few trials to train any at once)", 2, 1)


def test_commands_are_kept_in_order(tmp_path):
    ledger = tmp_path / "engine.jsonl"
    assert kept(ledger) == ()
    keep(ledger, PACKED, "s")
    keep(ledger, TRAINER, "s")
    assert kept(ledger) == kept(ledger, "s") == (PACKED, TRAINER)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.jsonl"]


def test_a_line_of_a_later_version_can_be_read(tmp_path):
    ledger = tmp_path / "engine.jsonl"
    line = {"engine": "packed", "trials": 1, "lanes": 2, "colour": "blue"}
    ledger.write_text(json.dumps(line) + "\n\n", encoding="utf-8")
    assert kept(ledger) == (EngineUse("packed", 1, 2),)


def test_a_line_that_was_damaged_is_passed_over(tmp_path):
    ledger = tmp_path / "engine.jsonl"
    keep(ledger, PACKED, "s")
    damage = b"\0" * 40 + b"\n7\n\xff"  # and the end of the line is missing
    with ledger.open("ab") as stream:
        stream.write(damage)
    assert kept(ledger) == (PACKED,)
    keep(ledger, TRAINER, "s")
    assert damage in ledger.read_bytes(), "nothing is thrown away"
    assert kept(ledger) == (PACKED, TRAINER)


def test_commands_of_a_deleted_study_stay_in_the_file_and_are_passed_over(tmp_path):
    ledger = tmp_path / "engine.jsonl"
    line = {"engine": "packed", "trials": 1, "lanes": 2}  # of a version that named no study
    ledger.write_text(json.dumps(line) + "\n", encoding="utf-8")
    keep(ledger, PACKED, "deleted")
    keep(ledger, TRAINER, "begun anew")
    unnamed = EngineUse("packed", 1, 2)
    assert kept(ledger, "begun anew") == (unnamed, TRAINER)
    assert kept(ledger, "deleted") == (unnamed, PACKED)
    assert kept(ledger) == (unnamed, PACKED, TRAINER)


def test_a_full_disk_is_said_and_costs_no_older_line(tmp_path, monkeypatch):
    ledger = tmp_path / "engine.jsonl"
    keep(ledger, TRAINER, "s")

    def full(self, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(StorageError, match="No space left on device"):
        keep(ledger, PACKED, "s")
    assert kept(ledger) == (TRAINER,)


def test_people_are_told_what_a_pack_did():
    assert sentence(PACKED) == (
        "The pack trained 3.0 trials at a time; 75% of the places that there was a "
        "trial for were busy; 90% of the tokens computed were real; 88% of the time went into "
        "steps; one more lane would take about 143 MiB; memory ran out and the lanes were halved, "
        "1 ×."
    )
    assert sentence(TRAINER) == ""


def test_a_run_shows_what_its_engine_has_a_word_for():
    assert metrics(TRAINER) == {"engine/lanes": 1}
    assert metrics(PACKED) == {
        "engine/lanes": 4,
        "engine/trials_at_once": 3,
        "engine/busy_share": 0.75,
        "engine/step_time_share": 0.875,
        "engine/real_token_share": 0.9,
        "engine/halvings": 1,
        "engine/bytes_per_lane": 150_000_000,
    }
