"""URLs of dataset folders: which are allowed, and how they are shown.

A URL names a place and nothing else. Credentials come from the environment or the client's own files, so a URL that
carries any is refused, and whatever is printed goes through `hide_credentials`.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from data_pipelines.errors import BadInput

SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*)[?#][^\s'\"]*")


def is_url(path: object) -> bool:
    """Whether this is a URL, of whatever scheme, and not a local path."""
    return isinstance(path, str) and _URL.match(path) is not None


def hide_credentials(text: object) -> str:
    """The text in one line, without user names, passwords, queries and fragments in any URL in it."""
    return _QUERY.sub(r"\1", _USER.sub("", " ".join(str(text).split())))


def check_url(url: str) -> str:
    """The URL of a dataset folder in its one form, without a slash at its end.

    Raises `BadInput` for a scheme that is not in `SCHEMES`, for credentials, a query or a fragment, and without a host
    or bucket.
    """
    shown = hide_credentials(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise BadInput(f"{shown}: not a URL ({error})") from None
    if parts.scheme not in SCHEMES:
        raise BadInput(f"{shown}: {parts.scheme}:// is not read; use one of {', '.join(SCHEMES)}, or a local folder")
    if "@" in parts.netloc:
        raise BadInput(
            f"{shown}: no user name or password in a URL; put them into ~/.netrc, or where the storage's client looks"
        )
    if parts.query or parts.fragment:
        raise BadInput(f"{shown}: a dataset's URL has no '?' and no '#' part")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise BadInput(f"{shown}: the URL holds white space")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise BadInput(f"{shown}: a file:// URL names a file of this machine: file:///path/to/folder")
        return f"file://{parts.path}"
    if not parts.netloc:
        raise BadInput(f"{shown}: names no {'host' if parts.scheme.startswith('http') else 'bucket'}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def local_path(url: str) -> str:
    """The path that a checked file:// URL names."""
    return unquote(urlsplit(url).path)
