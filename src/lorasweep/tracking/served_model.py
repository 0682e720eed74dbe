"""The code that MLflow keeps beside the champion's weights and runs where it is served.

It is copied into the logged model as it stands ("models from code"), so it imports nothing of
lorasweep: a serving environment needs mlflow, torch, transformers and pandas only. MLflow's own
transformers flavour was not taken: 3.17 is tested up to transformers 5.17 only, and its pyfunc
cuts no long text unless each caller asks, which ends in an index error.
"""

from typing import Any

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class ServedClassifier(PythonModel):
    """Texts in, one row per text out: ``label``, ``score``, and a ``probability_…`` per label."""

    def load_context(self, context: Any) -> None:
        """Load weights and tokenizer from the folder that was logged; no network is needed."""
        folder = context.artifacts["model"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder)
        self.model.to(self.device).eval()
        self.max_length = int(context.model_config["max_length"])
        self.batch_size = int(context.model_config["batch_size"])

    def predict(
        self,
        context: Any,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Classify texts: a list, a Series, or a frame's column ``text`` (else its first)."""
        texts = _texts(model_input)
        names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        rows = torch.zeros(len(texts), len(names))
        # Batches of like length need little padding; the rows go back to where they came from.
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            encoded = self.tokenizer(
                [texts[row] for row in batch],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                logits = self.model(**encoded).logits.float().cpu()
            rows[batch] = logits.softmax(dim=-1)
        score, best = rows.max(dim=1) if texts else (rows.sum(dim=1), rows.sum(dim=1).long())
        answer = {
            "label": [names[index] for index in best.tolist()],
            "score": score.double().tolist(),
        }
        for index, name in enumerate(names):
            answer[f"probability_{name}"] = rows[:, index].double().tolist()
        return pd.DataFrame(answer)


def _texts(model_input: Any) -> list[str]:
    """The texts of whatever MLflow or a caller hands over."""
    if isinstance(model_input, str):
        return [model_input]
    if isinstance(model_input, pd.DataFrame):
        column = "text" if "text" in model_input.columns else model_input.columns[0]
        model_input = model_input[column]
    return [str(text) for text in model_input]


set_model(ServedClassifier())
