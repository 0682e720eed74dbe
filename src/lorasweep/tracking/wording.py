"""How names and values are written so that MLflow takes every one of them. Pure functions."""

from __future__ import annotations

import hashlib
import posixpath
import re
from urllib.parse import unquote_plus

from lorasweep.core.plans import ParameterValue

# MLflow's limits (mlflow/utils/validation.py); a value beyond them is refused or cut silently.
PARAM_CHARACTERS = 6_000
TAG_CHARACTERS = 8_000
KEY_CHARACTERS = 250

_FOREIGN = re.compile(r"[^\w\-. /:]", re.ASCII)
# As SQLAlchemy reads a URL, where a password has every sign but @. More of them before the next
# slash are those of somebody who didn't know that.
_PASSWORD = re.compile(r"(://[^:/\[]*):[^@]*@(?:[^@/?#]*@)*")
# What looks like it and is none: the port of a server, and an @ somewhere in its path.
_PORT = re.compile(r"https?://[^:/\[]*:\d*(?:[/?#]|$)")
_SECRET = re.compile(r"(passw|passphrase|pwd|token|secret|api[_-]?key)[\w-]*\s*=", re.IGNORECASE)


def param_text(value: ParameterValue) -> str:
    """Return a parameter as text, in YAML's words, so that the UI reads like the spec.

    >>> param_text(None), param_text(True), param_text(2e-05), param_text(8)
    ('null', 'true', '2e-05', '8')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return shortened(str(value), PARAM_CHARACTERS)


def shortened(text: str, limit: int) -> str:
    """Return ``text``, or its beginning and the SHA-256 of all of it when it is too long.

    The digest keeps two long values that begin alike apart.
    """
    if len(text) <= limit:
        return text
    ending = f"… (shortened from {len(text)} characters, sha256 {_digest(text)[:16]})"
    return text[: limit - len(ending)] + ending


def key(name: str) -> str:
    """Return a name that MLflow accepts for a param, metric or tag.

    Characters it refuses become ``_``. A changed name gets six digits of its digest, so
    that two label names which differ in a refused character don't become one metric.

    >>> key("val_f1"), key("per_class/très bien/f1") == key("per_class/tr_s bien/f1")
    ('val_f1', False)
    """
    clean = _FOREIGN.sub("_", name)
    # MLflow refuses names that would resolve to another path, such as ``a//b`` or ``../a``.
    clean = posixpath.normpath(clean).lstrip("./") or "_"
    if clean == name and len(name) <= KEY_CHARACTERS:
        return name
    return f"{clean[: KEY_CHARACTERS - 7]}-{_digest(name)[:6]}"


def redacted(uri: str) -> str:
    """Return a store's URI without passwords and tokens, for messages and documents.

    >>> redacted("postgresql://me:ab/cd@host/runs?sslpassword=ef")
    'postgresql://me:***@host/runs?sslpassword=***'
    """
    address, mark, query = uri.partition("?")
    shown = address + mark + "&".join(map(_without_secret, query.split("&")))
    return shown if _PORT.search(shown) else _PASSWORD.sub(r"\1:***@", shown)


def _without_secret(setting: str) -> str:
    """A setting in a URI's query; none of its value where that may be, or hold, a secret.

    An ODBC connection string is one value, percent-encoded, with names and passwords of its own.
    """
    if not _SECRET.search(unquote_plus(setting)):
        return setting
    name, equals, _ = setting.partition("=")
    return f"{name}=***" if equals else "***"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
