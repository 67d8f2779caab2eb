"""Files in object stores and on the Hugging Face Hub, through fsspec's filesystems: s3fs, gcsfs, huggingface_hub.

Credentials and endpoints are the client's own business (environment, its files). Everything is read by ranges, so that
a cut download goes on where it ended. A forked worker makes a filesystem of its own: fsspec's do not survive a fork.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.remote.addresses import allowed_addresses, is_public, refused
from data_pipelines.remote.folder import Broken, WrongSize
from data_pipelines.remote.urls import hide_credentials

Result = TypeVar("Result")

_PART_BYTES = 8 << 20
_PACKAGES = {"s3": "'triptych[s3]'", "gs": "'triptych[gs]'", "hf": "huggingface_hub"}
# Where each client goes unless its own settings say otherwise: (environment variables, default).
_ENDPOINTS = {
    "s3": (("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "https://s3.amazonaws.com"),
    "gs": (("STORAGE_EMULATOR_HOST",), "https://storage.googleapis.com"),
    "hf": (("HF_ENDPOINT",), "https://huggingface.co"),
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
        name = f"{self._root}/{path}"
        if size is None:
            size = int(self._call(path, lambda files: files.info(name)["size"]))
        while start < size:
            wanted = min(_PART_BYTES, size - start)
            data = self._range(path, start, wanted)
            if len(data) < wanted:
                raise WrongSize(f"{start + len(data):,} bytes at the server")
            yield data
            start += wanted

    def read(self, path: str, start: int, length: int) -> bytes:
        """See `RemoteFolder.read`."""
        data = self._range(path, start, length)
        if len(data) < length:
            raise BadInput(f"{self.location}/{path}: ends before byte {start + length}; it changed since indexed")
        return data

    def _range(self, path: str, start: int, length: int) -> bytes:
        name = f"{self._root}/{path}"
        return self._call(path, lambda files: bytes(files.cat_file(name, start=start, end=start + length)))

    def _call(self, path: str, function: Callable[[Any], Result]) -> Result:
        where = f"{self.location}/{path}"
        self._refused = None
        try:
            return function(self._filesystem())
        except BadInput:
            raise
        except FileNotFoundError:
            raise BadInput(f"{where}: no such file") from None
        except PermissionError as error:
            raise BadInput(f"{where}: not allowed ({_shown(error)})") from None
        except Exception as error:
            if self._refused is not None:
                raise self._refused from None
            if "Credential" in type(error).__name__:
                raise BadInput(f"{where}: {_shown(error)}") from None
            raise Broken(_shown(error)) from None

    def _filesystem(self) -> Any:
        """The filesystem of this process. Raises `BadInput` without its package, or at a refused address."""
        if self._process != os.getpid():
            self._check_endpoint()
            # Kept, for its end would talk to an event loop whose thread is not in this process.
            self._inherited = self._open
            try:
                import fsspec

                self._open = fsspec.filesystem(self._scheme, skip_instance_cache=True, **self._options())
            except ImportError as error:
                needed = f"{self.location}: {self._scheme}:// needs the package {error.name}"
                raise BadInput(f"{needed}: pip install {_PACKAGES[self._scheme]}") from None
            self._process = os.getpid()
        return self._open

    def _options(self) -> dict[str, Any]:
        if self._scheme != "s3":
            return {}
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

    def _check_endpoint(self) -> None:
        """Raise `BadInput` when the endpoint of the client's settings is at an address that is not allowed."""
        names, default = _ENDPOINTS[self._scheme]
        endpoint = next((os.environ[name] for name in names if os.environ.get(name)), default)
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        if self._settings.allow_private_addresses or endpoint == default:
            return
        try:
            allowed_addresses(parts.hostname or "", parts.port or 443, False)
        except OSError:
            # It cannot be resolved now; the client will say so.
            return


def _shown(error: BaseException) -> str:
    return hide_credentials(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
