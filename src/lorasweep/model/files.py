"""From a model's name to the local files of it: embedded, a folder, or a snapshot of the Hub.

Only what lorasweep loads is fetched: the configuration, the tokenizer and weights in the
safetensors format. Pickled weights and code of a repository are never touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorasweep.core.errors import ModelError, Problem
from lorasweep.model.embedded import EMBEDDED_NAME, digest_files, embedded_folder
from lorasweep.spec.schema import ModelSpec

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_TOKENIZER_EXTRAS = (
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The local files of a base.

    Attributes:
        folder: Holds configuration, tokenizer and weights.
        revision: The Hub's commit; None for a local folder.
        digest: SHA-256 of the weights.
    """

    folder: Path
    revision: str | None
    digest: str


def locate(spec: ModelSpec) -> ModelFiles:
    """Find the files of a model, downloading what the Hub has and the cache lacks.

    Raises:
        ModelError: There is no such model, or it has no safetensors weights or no tokenizer.
    """
    where = f"model.name {spec.name}"
    local = Path(spec.name).expanduser()
    if spec.name == EMBEDDED_NAME or local.is_dir():
        if spec.revision is not None:
            raise ModelError(
                Problem(
                    "model.revision",
                    f"names a commit of the Hub, but {spec.name} is a local folder",
                    "Remove it.",
                )
            )
        folder = embedded_folder() if spec.name == EMBEDDED_NAME else local.resolve()
        weights = _local_weights(folder, where)
        return ModelFiles(folder, None, digest_files(weights))
    return _from_hub(spec, where)


def _local_weights(folder: Path, where: str) -> list[Path]:
    """Check a folder for what a base needs and return its weights files."""
    problems = []
    if not (folder / "config.json").is_file():
        problems.append(
            Problem(where, f"the folder {folder} holds no config.json", "Is it a model's folder?")
        )
    weights: list[Path] = []
    if (folder / _WEIGHTS).is_file():
        weights = [folder / _WEIGHTS]
    elif (folder / _INDEX).is_file():
        weights = [folder / name for name in _shards(folder / _INDEX)]
        missing = [path.name for path in weights if not path.is_file()]
        if missing:
            problems.append(Problem(where, f"{folder} lacks the weights {', '.join(missing)}"))
    else:
        problems.append(_no_weights(where, any((folder / name).exists() for name in _PICKLED)))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        problems.append(_no_tokenizer(where, str(folder)))
    if problems:
        raise ModelError(problems)
    return weights


def _from_hub(spec: ModelSpec, where: str) -> ModelFiles:
    looks_like_path = spec.name.startswith((".", "/", "~")) or spec.name.count("/") > 1
    if looks_like_path:
        raise ModelError(
            Problem(
                where,
                f"there is no folder {Path(spec.name).expanduser().absolute()}",
                f"Give an existing folder, a Hub id such as distilbert-base-uncased, "
                f"or {EMBEDDED_NAME}.",
            )
        )
    config = _hub_file(spec, where, "config.json", spec.revision, required=True)
    if config is None:
        raise ModelError(Problem(where, "the repository on the Hub has no config.json"))
    # All other files come from the commit that the configuration came from, even if the
    # branch moves on meanwhile.
    commit = config.parent.name
    weights = _hub_weights(spec, where, commit)
    tokenizer = [_hub_file(spec, where, name, commit) for name in TOKENIZERS]
    for name in _TOKENIZER_EXTRAS:
        _hub_file(spec, where, name, commit)
    if not any(tokenizer):
        raise ModelError(_no_tokenizer(where, "the repository"))
    return ModelFiles(config.parent, commit, digest_files(weights))


def _hub_weights(spec: ModelSpec, where: str, commit: str) -> list[Path]:
    single = _hub_file(spec, where, _WEIGHTS, commit)
    if single is not None:
        return [single]
    index = _hub_file(spec, where, _INDEX, commit)
    if index is None:
        # Required: offline, "not in the cache" must not be told as "not in the repository".
        _hub_file(spec, where, _WEIGHTS, commit, required=True)
        raise ModelError(_no_weights(where, pickled=False))
    shards = [_hub_file(spec, where, name, commit, required=True) for name in _shards(index)]
    if None in shards:
        raise ModelError(Problem(where, f"the repository lacks weights that {_INDEX} names"))
    return [shard for shard in shards if shard is not None]


def _hub_file(
    spec: ModelSpec, where: str, name: str, revision: str | None, *, required: bool = False
) -> Path | None:
    """Return a file of a repository, from the cache or downloaded; None if it has no such file.

    Raises:
        ModelError: No such repository; or the file is required, not in the cache, and the Hub
            can't be asked.
    """
    missing = f"there is no local folder {spec.name}, and the Hub"
    try:
        return Path(hf_hub_download(spec.name, name, revision=revision))
    except LocalEntryNotFoundError as error:
        if not required:
            return None
        problem = Problem(
            where,
            f"{missing} can't be asked for {name}: it is unreachable or offline mode is on, and "
            "the file is not in the local cache",
            f"Connect to the network, give a local folder, or use {EMBEDDED_NAME}.",
        )
        raise ModelError(problem) from error
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError as error:
        problem = Problem(where, f"the Hub has no revision {spec.revision} of it")
        raise ModelError(problem) from error
    except GatedRepoError as error:
        problem = Problem(
            where,
            "the Hub gives this model only to those who accepted its terms",
            "Accept them on its page, then log in with: hf auth login",
        )
        raise ModelError(problem) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        problem = Problem(where, f"{missing} has no such public model", "Check the spelling.")
        raise ModelError(problem) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(Problem(where, f"{missing} answers: {error}")) from error


def _shards(index: Path) -> list[str]:
    """Return the names of the weights files that an index lists, sorted."""
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(listed.values()))


def _no_weights(where: str, pickled: bool) -> Problem:
    found = ", only pickled weights (pytorch_model.bin), which can run code" if pickled else ""
    return Problem(
        where,
        f"it has no weights in the safetensors format{found}",
        "Convert it once with model.save_pretrained(FOLDER) and give that folder."
        if pickled
        else f"{_WEIGHTS} must lie beside config.json.",
    )


def _no_tokenizer(where: str, place: str) -> Problem:
    return Problem(
        where,
        f"{place} holds no tokenizer",
        "Save the one that the model was trained with beside it: tokenizer.save_pretrained(FOLDER)",
    )
