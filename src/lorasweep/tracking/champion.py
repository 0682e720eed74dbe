"""The sweep's best model as an MLflow model: logged, registered, and called ``champion``."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from transformers.utils import logging as transformers_logging

from lorasweep.model.checkpoint import storing
from lorasweep.tracking import store
from lorasweep.tracking.mlflow_tracker import MlflowTracker

with warnings.catch_warnings():
    # MLflow 3.17 warns of its own classes' type hints while mlflow.pyfunc is imported.
    warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIAS = "champion"

_MODEL_TAG = "lorasweep.model_id"  # a version that is searched for comes without its model's id
_BATCH_SIZE = 32
_REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas")
_MAKE_ROOM = "Make room there or set TMPDIR to another folder, then run the same command again."


@dataclass(frozen=True, slots=True)
class Champion:
    """A registered model version.

    Attributes:
        name: Of the registered model: the sweep's.
        version: Counted from 1 by MLflow.
        model_id: Of the logged model behind it.
        created: False when this winner was registered already.
    """

    name: str
    version: str
    model_id: str
    created: bool

    @property
    def uri(self) -> str:
        """What ``mlflow.pyfunc.load_model`` takes."""
        return f"models:/{self.name}@{ALIAS}"


def log_champion(
    tracker: MlflowTracker,
    run_id: str,
    *,
    model_name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example_texts: Sequence[str],
    label_names: Sequence[str],
    metadata: Mapping[str, Any],
) -> Champion:
    """Log a merged classifier with signature and input example, and register it as the champion.

    ``mlflow.pyfunc.load_model("models:/NAME@champion").predict(texts)`` then answers with a
    frame of ``label``, ``score`` and a ``probability_NAME`` per label. Called again for the
    same run it only sees to the alias, so that repeating a report adds no version.

    Args:
        tracker: The open store.
        run_id: The winner's run.
        model_name: The registered model's name.
        model: A plain transformers classifier, the adapter merged into it.
        tokenizer: Its tokenizer.
        example_texts: A few texts of the kind it classifies; one at least.
        label_names: In order of label index.
        metadata: Anything JSON takes; ``max_length`` in it is where texts are cut.

    Raises:
        TrackingError: The store refuses.
        StorageError: There is no room in the folder for temporary files.
    """
    client = tracker.client
    with store.telling(tracker.uri, f"register the model {model_name!r}"):
        known = _registered(client, model_name, run_id)
        if known is None:
            with _no_bars(), _scratch() as scratch:
                weights = Path(scratch) / "weights"
                with storing(weights, "the champion", _MAKE_ROOM):
                    _save_weights(model, tokenizer, label_names, weights)
                model_id = _log(
                    tracker,
                    run_id,
                    weights=weights,
                    saved=Path(scratch) / "model",
                    examples=list(example_texts),
                    label_names=label_names,
                    metadata={**metadata, "label_names": list(label_names)},
                    max_length=_max_length(model, tokenizer, metadata),
                )
            champion = _register(client, model_name, run_id, model_id)
        else:
            champion = known
        client.set_registered_model_alias(model_name, ALIAS, champion.version)
        return champion


@contextmanager
def _scratch() -> Iterator[str]:
    with storing(Path("a temporary folder"), "the champion", _MAKE_ROOM):
        folder = tempfile.TemporaryDirectory(prefix="lorasweep-")
    with folder as path:
        yield path


def _registered(client: MlflowClient, name: str, run_id: str) -> Champion | None:
    versions = client.search_model_versions(f"name = '{name}'")
    mine = [version for version in versions if version.run_id == run_id]
    if not mine:
        return None
    latest = max(mine, key=lambda version: int(version.version))
    return Champion(name, str(latest.version), str(latest.tags.get(_MODEL_TAG, "")), created=False)


def _save_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    folder: Path,
) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # A copy: the caller's model stays as it was.
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    config.save_pretrained(folder)


def _log(
    tracker: MlflowTracker,
    run_id: str,
    *,
    weights: Path,
    saved: Path,
    examples: list[str],
    label_names: Sequence[str],
    metadata: Mapping[str, Any],
    max_length: int,
) -> str:
    """Log the model under the run and return its id.

    These are the steps of ``mlflow.pyfunc.log_model``, which itself goes by the global
    tracking URI and experiment, and loads the model once more to guess its requirements.
    """
    client = tracker.client
    params = client.get_run(run_id).data.params
    logged = client.create_logged_model(
        tracker.experiment_id, name="model", source_run_id=run_id, params=params
    )
    try:
        with storing(saved, "the champion", _MAKE_ROOM):
            mlflow.pyfunc.save_model(
                path=str(saved),
                python_model=Path(__file__).with_name("served_model.py"),
                artifacts={"model": str(weights)},
                model_config={"max_length": max_length, "batch_size": _BATCH_SIZE},
                signature=_signature(label_names),
                input_example=examples,
                pip_requirements=[f"{p}=={installed(p).split('+')[0]}" for p in _REQUIREMENTS],
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run_id,
                    model_id=logged.model_id,
                    model_uuid=logged.model_id,
                ),
                metadata=dict(metadata),
            )
        client.log_model_artifacts(logged.model_id, str(saved))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_id)


def _register(client: MlflowClient, name: str, run_id: str, model_id: str) -> Champion:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # By its place and not as models:/ID, which the database store would look up at the global
    # tracking URI (and create a database there).
    place = client.get_logged_model(model_id).artifact_location
    version = client.create_model_version(
        name, source=place, run_id=run_id, model_id=model_id, tags={_MODEL_TAG: model_id}
    )
    number = str(version.version)
    # From this tag the UI's model page knows its registered versions.
    known = json.dumps([{"name": name, "version": number}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": known})
    return Champion(name, number, model_id, created=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the progress bars of MLflow and transformers off the terminal: it has a live view."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with store.settings({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _signature(label_names: Sequence[str]) -> ModelSignature:
    """One nameless column of texts in (so that a plain list is taken); names out."""
    numbers = ["score", *(f"probability_{name}" for name in label_names)]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "label"),
                *(ColSpec(DataType.double, number) for number in numbers),
            ]
        ),
    )


def _max_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]
) -> int:
    """Where texts are cut: as in training, else where tokenizer and position embeddings end."""
    if metadata.get("max_length"):
        return int(metadata["max_length"])
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    return int(min(tokenizer.model_max_length, positions))
