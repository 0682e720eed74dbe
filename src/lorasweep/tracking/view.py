"""A table of a sweep's trials for the MLflow UI, which by itself shows no param and no metric.

The UI keeps a view that somebody shares as an experiment tag, ``mlflow.sharedViewState.KEY``, and
opens it by ``?viewStateShareKey=KEY`` (seen in MLflow 3.17). Where another version reads it
otherwise, the plain list of runs is what opens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote

from mlflow import MlflowClient

from lorasweep.tracking import store

PARAMETERS = (
    "learning_rate",
    "epochs",
    "rank",
    "alpha",
    "scaling",
    "batch_size",
    "dropout",
    "weight_decay",
    "warmup",
    "scheduler",
    "targets",
    "top_layers",
    "seed",
)
"""What a space may search; the UI leaves out the columns that no run has."""

METRICS = ("val_f1", "val_accuracy", "val_loss")


def save_view(
    client: MlflowClient,
    experiment_id: str,
    *,
    name: str,
    parent: str,
    parameters: Sequence[str] = PARAMETERS,
    sort_by: str = "val_f1",
) -> None:
    """Offer the sweep's trials as a table: best first, with parameters, scores and states.

    Args:
        client: Of the store.
        experiment_id: Where the sweep lies.
        name: The sweep's name, which is the view's key.
        parent: The sweep's run.
        parameters: Names of the params to show.
        sort_by: Name of the metric that the best trial has most of.
    """
    metrics = dict.fromkeys((sort_by, *METRICS))
    view = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "orderByKey": f"metrics.`{sort_by}`",
        "orderByAsc": False,
        "selectedColumns": [
            "attributes.`Models`",
            *(f"params.`{parameter}`" for parameter in parameters),
            *(f"metrics.`{metric}`" for metric in metrics),
            "tags.`lorasweep.state`",
        ],
    }
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{name}", json.dumps(view))


def view_address(uri: str, experiment: str, name: str, server: str) -> str:
    """Return where the UI shows the trials of a sweep.

    Args:
        uri: The store's tracking URI.
        experiment: Name of the experiment.
        name: Name of the sweep.
        server: Where the UI is, such as ``http://127.0.0.1:5000``.

    Returns:
        The address of the trials' table, or of the UI as such where the store knows no such
        experiment.

    Raises:
        TrackingError: The store can't be used.
    """
    client = store.open_client(uri)
    with store.telling(uri, f"look for the experiment {experiment!r}"):
        found = client.get_experiment_by_name(experiment)
    root = server.rstrip("/")
    if found is None:
        return root
    key = quote(name, safe="")
    return f"{root}/#/experiments/{found.experiment_id}/runs?viewStateShareKey={key}"
