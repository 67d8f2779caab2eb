"""Files in object stores and on the Hugging Face Hub, through their clients: s3fs, gcsfs, huggingface_hub.

Credentials and endpoints are the client's own business (environment, its files). Everything is read by ranges, so that
a cut download goes on where it ended. A forked worker makes a filesystem of its own: fsspec's do not survive a fork.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.remote.addresses import allowed_addresses, is_public, refused
from data_pipelines.remote.folder import Broken, WrongSize
from data_pipelines.remote.hub import HubFiles
from data_pipelines.remote.urls import hide_credentials

_PART_BYTES = 8 << 20
_PACKAGES = {"s3": "'triptych[s3]'", "gs": "'triptych[gs]'", "hf": "huggingface_hub"}
# Where s3fs goes unless its own settings say otherwise: environment variables, and the default.
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_PUBLIC_ENDPOINTS = ("https://s3.amazonaws.com", "https://storage.googleapis.com", "https://huggingface.co")
_NOT_ALLOWED = (401, 403)
_NOT_FOUND = 404
_OUT_OF_RANGE = 416
# What huggingface_hub's errors mean to somebody who reads a dataset.
_HUB_REASONS = {
    "GatedRepoError": "a gated repository; ask for access on its page, and read it with a token (HF_TOKEN)",
    "RepositoryNotFoundError": "no such repository on the Hub, or a private one that the token (HF_TOKEN) may not read",
    "RevisionNotFoundError": "no such revision of the repository",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
}


class ObjectFolder:
    """A `RemoteFolder` below s3://bucket/prefix, gs://bucket/prefix or hf://datasets/owner/name."""

    def __init__(self, url: str, settings: RemoteConfig) -> None:
        self.location = url
        self._settings = settings
        self._scheme, _, self._root = url.partition("://")
        self._process = -1
        self._open: Any = None
        self._inherited: Any = None
        self._refused: BadInput | None = None
        self._filesystem()

    def __reduce__(self) -> tuple[type[ObjectFolder], tuple[str, RemoteConfig]]:
        return ObjectFolder, (self.location, self._settings)

    def stream(self, path: str, start: int, size: int | None) -> Generator[bytes, None, None]:
        """See `RemoteFolder.stream`."""
        while size is None or start < size:
            wanted = _PART_BYTES if size is None else min(_PART_BYTES, size - start)
            data = self._range(path, start, wanted)
            start += len(data)
            if data:
                yield data
            if len(data) < wanted:
                if size is None:
                    return
                raise WrongSize(f"{start:,} bytes at the server")

    def read(self, path: str, start: int, length: int) -> bytes:
        """See `RemoteFolder.read`."""
        data = self._range(path, start, length)
        if len(data) < length:
            raise BadInput(f"{self.location}/{path}: ends before byte {start + length}; it changed since indexed")
        return data

    def _range(self, path: str, start: int, length: int) -> bytes:
        """What the file has of these bytes."""
        where = f"{self.location}/{path}"
        self._refused = None
        try:
            return bytes(self._filesystem().cat_file(f"{self._root}/{path}", start=start, end=start + length))
        except BadInput:
            raise
        except Exception as error:
            if self._refused is not None:
                raise self._refused from None
            status = _status(error)
            if status == _OUT_OF_RANGE:
                return b""
            reason = _HUB_REASONS.get(type(error).__name__)
            if self._scheme == "hf" and status in _NOT_ALLOWED:
                reason = reason or f"the token (HF_TOKEN) is not valid, or may not read it ({status})"
            if reason is not None:
                raise BadInput(f"{where}: {reason}") from None
            if isinstance(error, FileNotFoundError) or status == _NOT_FOUND:
                raise BadInput(f"{where}: no such file") from None
            if isinstance(error, PermissionError) or status in _NOT_ALLOWED:
                raise BadInput(f"{where}: not allowed ({_shown(error)})") from None
            if "Credential" in type(error).__name__:
                raise BadInput(f"{where}: {_shown(error)}") from None
            raise Broken(_shown(error)) from None

    def _filesystem(self) -> Any:
        """The filesystem of this process. Raises `BadInput` without its package, or at a refused address."""
        if self._process != os.getpid():
            # Kept, for its end would talk to an event loop whose thread is not in this process.
            self._inherited = self._open
            try:
                opened = self._make_filesystem()
            except ImportError as error:
                needed = f"{self.location}: {self._scheme}:// needs the package {error.name}"
                raise BadInput(f"{needed}: pip install {_PACKAGES[self._scheme]}") from None
            self._check_endpoint(opened)
            self._open = opened
            self._process = os.getpid()
        return self._open

    def _make_filesystem(self) -> Any:
        if self._scheme == "hf":
            return HubFiles(self._settings.timeout_seconds)
        if self._scheme == "gs":
            # Not the one that gcsfs and fsspec hand out: it asks for the kind of bucket by gRPC, which no fork survives
            # and which knows no endpoint without TLS.
            from aiohttp import ClientTimeout
            from gcsfs.core import GCSFileSystem

            seconds = self._settings.timeout_seconds
            timeout = ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            return GCSFileSystem(access="read_only", requests_timeout=timeout, skip_instance_cache=True)
        import fsspec

        return fsspec.filesystem("s3", skip_instance_cache=True, **self._s3_options())

    def _s3_options(self) -> dict[str, Any]:
        seconds = self._settings.timeout_seconds
        config: dict[str, Any] = {"connect_timeout": seconds, "read_timeout": seconds}
        if not self._settings.allow_private_addresses:
            config["connector_args"] = {"socket_factory": self._socket}
        return {"config_kwargs": config}

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """A socket for the address that the S3 client is about to connect to, redirects included."""
        family, kind, protocol, _, where = address
        if not is_public(str(where[0])):
            self._refused = refused(str(where[0]), str(where[0]))
            raise OSError(str(self._refused))
        return socket.socket(family, kind, protocol)

    def _check_endpoint(self, files: Any) -> None:
        """Raise `BadInput` when the client's endpoint is at an address that is not allowed."""
        if self._scheme == "s3":
            endpoint = next((os.environ[name] for name in _S3_ENDPOINTS if os.environ.get(name)), _PUBLIC_ENDPOINTS[0])
        else:
            endpoint = files.endpoint if self._scheme == "hf" else files._location
        if self._settings.allow_private_addresses or endpoint in _PUBLIC_ENDPOINTS:
            return
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        try:
            allowed_addresses(parts.hostname or "", parts.port or 443, False)
        except OSError:
            # It cannot be resolved now; the client will say so.
            return


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer that made a client raise this, where it can be told."""
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):
        # All that gcsfs says of a 403.
        return 403
    for found in (error, error.__cause__):
        answer = getattr(found, "response", None)
        if isinstance(answer, dict):
            answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            answer = getattr(answer, "status_code", None) or getattr(found, "code", None)
        if isinstance(answer, int):
            return answer
    return None


def _shown(error: BaseException) -> str:
    name = type(error).__name__
    return hide_credentials(f"{name}: {error}") if str(error) else name
