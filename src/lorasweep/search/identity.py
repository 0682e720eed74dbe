"""A study belongs to one spec, one data set and one base; going on with others is refused."""

from __future__ import annotations

import uuid
from pathlib import Path

import optuna

from lorasweep.core.errors import ConflictError, Problem

STUDY_ID = "id"
_FINGERPRINT = "fingerprint"


def create_or_compare(
    storage: optuna.storages.RDBStorage, database: Path, name: str, fingerprint: dict[str, str]
) -> None:
    """Make the study, or see that it is the one that the fingerprint describes.

    Args:
        storage: Connected to the database.
        database: The file, for people.
        name: The study's name.
        fingerprint: What must not change between two commands, part by part.

    Raises:
        ConflictError: With every part that has changed.
    """
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True
    )
    stored = study.user_attrs.get(_FINGERPRINT)
    if stored is None:
        if study.get_trials(deepcopy=False):
            what = f"has a study {name!r} that another program made"
            raise ConflictError(Problem(str(database), what, "Give the sweep another name."))
        # A kill between the two writes leaves a study without trials, and it is taken over.
        study.set_user_attr(STUDY_ID, uuid.uuid4().hex)
        study.set_user_attr(_FINGERPRINT, fingerprint)
        return
    differing = sorted(
        key for key in {*stored, *fingerprint} if stored.get(key) != fingerprint.get(key)
    )
    if not differing:
        return
    advice = (
        "Undo the change, or give the sweep another name, or start it over after `optuna "
        f"delete-study --study-name {name} --storage sqlite:///{database.absolute()}`."
    )
    raise ConflictError(
        Problem(
            key,
            f"the sweep {name!r} was begun with {_short(stored.get(key))} here, and now it is "
            f"{_short(fingerprint.get(key))}; its trials would not compare",
            advice if key == differing[-1] else "",
        )
        for key in differing
    )


def _short(value: str | None) -> str:
    text = "nothing" if value is None else value
    return text if len(text) <= 60 else f"{text[:57]}..."
