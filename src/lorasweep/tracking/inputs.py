"""A corpus as MLflow knows data sets."""

from __future__ import annotations

import json

from mlflow.entities import Dataset, DatasetInput, InputTag

from lorasweep.core.corpora import Corpus, TextSplit
from lorasweep.tracking import wording


def dataset_inputs(corpus: Corpus) -> list[DatasetInput]:
    """Return one input per split, with its digest, schema, and rows per label."""
    splits = (corpus.train, corpus.validation, corpus.test)
    return [_dataset_input(corpus, split) for split in splits if split is not None]


def _dataset_input(corpus: Corpus, split: TextSplit) -> DatasetInput:
    columns = [
        {"type": "string", "name": "text", "required": True},
        {"type": "long", "name": "label", "required": True},
    ]
    rows = {
        "num_rows": len(split),
        "rows_per_label": {
            name: split.labels.count(index) for index, name in enumerate(corpus.label_names)
        },
    }
    dataset = Dataset(
        name=wording.shortened(f"{corpus.name}/{split.name}", 500),
        # MLflow's column holds 36 characters; the whole digests are in the resolved provenance.
        digest=corpus.digests[split.name][:36],
        source_type="local",
        source=json.dumps({"uri": corpus.source}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps(rows),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", split.name)])
