"""Files below an http(s) URL.

The standard library's client instead of fsspec's: a shard is streamed and never whole in memory, an answer that ignores
the range is noticed, and the socket goes to the address that was checked, after every redirect again. Proxies of the
environment are not used. A connection is kept for each thread; a forked worker opens its own.
"""

from __future__ import annotations

import base64
import http.client
import netrc
import os
import re
import ssl
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.remote.addresses import connect
from data_pipelines.remote.folder import CHUNK_BYTES, Broken, WrongSize
from data_pipelines.remote.urls import hide_credentials

_MAX_REDIRECTS = 5
_MOST_CONNECTIONS = 4
_REDIRECTS = (301, 302, 303, 307, 308)
# Worth another attempt, beside all of 5xx: timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")
# What a server may send with a redirect or an error, read only to use the connection again.
_MOST_NOISE_BYTES = 1 << 16
_MOST_SHOWN = 200
# All that a path and a query may hold (RFC 3986), and escapes; the rest is escaped before it is sent.
_SENT_AS_IT_IS = "/?:@!$&'()*+,;=%"


class _Connection(http.client.HTTPConnection):
    def __init__(self, url: SplitResult, settings: RemoteConfig) -> None:
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        super().__init__(url.hostname or "", url.port or (443 if self._tls else 80), timeout=settings.timeout_seconds)
        self._allow_private = settings.allow_private_addresses
        self.default_port = 443 if self._tls else 80
        self.used = False

    def connect(self) -> None:
        plain = connect(self.host, self.port, self.timeout or 0, self._allow_private)
        self.sock = plain if self._tls is None else self._tls.wrap_socket(plain, server_hostname=self.host)


class HttpFolder:
    """A `RemoteFolder` on a web server that serves files, with ranges if downloads are to be resumed."""

    def __init__(self, url: str, settings: RemoteConfig) -> None:
        self.location = url
        self._settings = settings
        self._mine = threading.local()

    def __reduce__(self) -> tuple[type[HttpFolder], tuple[str, RemoteConfig]]:
        return HttpFolder, (self.location, self._settings)

    def stream(self, path: str, start: int, size: int | None) -> Generator[bytes, None, None]:
        """See `RemoteFolder.stream`. A server that knows no ranges sends all, and what came before is passed over."""
        with self._answer(path, f"bytes={start}-" if start else None) as response:
            skip, end = 0, response.length
            if response.status == 206:
                first, last, total = _content_range(response)
                if first != start:
                    raise Broken(f"asked for byte {start}, got byte {first}")
                end = total
            elif start:
                skip = start
            if size is not None and end is not None and end != size:
                raise WrongSize(f"{end:,} bytes at the server")
            place = 0 if skip else start
            while chunk := _read(response, CHUNK_BYTES):
                place += len(chunk)
                if place > start:
                    yield chunk[max(0, len(chunk) - (place - start)) :] if skip else chunk
            if end is not None and place < end:
                raise Broken(f"the connection was cut at byte {place:,} of {end:,}")

    def read(self, path: str, start: int, length: int) -> bytes:
        """See `RemoteFolder.read`. Raises `BadInput` where the server knows no ranges."""
        where = f"{self.location}/{path}"
        with self._answer(path, f"bytes={start}-{start + length - 1}") as response:
            if response.status != 206:
                raise BadInput(f"{where}: the server does not serve ranges; use data.remote.mode: cache")
            first, last, _ = _content_range(response)
            if (first, last) != (start, start + length - 1):
                raise BadInput(f"{where}: ends before byte {start + length}; it changed since it was indexed")
            data = bytearray()
            while len(data) < length and (chunk := _read(response, length - len(data))):
                data += chunk
            if len(data) < length:
                raise Broken("the connection was cut")
            return bytes(data)

    @contextmanager
    def _answer(self, path: str, byte_range: str | None) -> Generator[http.client.HTTPResponse, None, None]:
        """The answer with status 200 or 206, redirects followed. Its connection is kept if all of it is read."""
        where = f"{self.location}/{path}"
        url = f"{self.location}/{quote(path)}"
        for _ in range(_MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            response = self._request(parts, byte_range, where)
            if response.status not in _REDIRECTS:
                break
            _pass_over(response)
            if not response.isclosed():
                self._drop(parts)
            url = _target(url, response.headers.get("Location", ""), where)
        else:
            raise BadInput(f"{where}: more than {_MAX_REDIRECTS} redirects")
        try:
            if response.status not in (200, 206):
                raise _refusal(response, where)
            yield response
        finally:
            if response.length == 0:
                # All of it was read, which `read1` does not note.
                response.close()
            if not response.isclosed():
                self._drop(parts)

    def _request(self, url: SplitResult, byte_range: str | None, where: str) -> http.client.HTTPResponse:
        headers = {"Accept-Encoding": "identity", "User-Agent": "triptych", **self._credentials(url)}
        if byte_range is not None:
            headers["Range"] = byte_range
        target = quote((url.path or "/") + (f"?{url.query}" if url.query else ""), safe=_SENT_AS_IT_IS)
        while True:
            connection = self._connection(url)
            used, connection.used = connection.used, True
            try:
                connection.request("GET", target, headers=headers)
                return connection.getresponse()
            except ssl.SSLCertVerificationError as error:
                self._drop(url)
                raise BadInput(f"{where}: the server's certificate is not trusted ({error.verify_message})") from None
            except (OSError, http.client.HTTPException) as error:
                self._drop(url)
                # A server closes connections that were idle; that is no failure of this request.
                if not (used and isinstance(error, (ConnectionError, http.client.BadStatusLine))):
                    raise Broken(_reason(error)) from None
            except BaseException:
                self._drop(url)
                raise

    def _credentials(self, url: SplitResult) -> dict[str, str]:
        """Basic authentication from ~/.netrc, for the folder's own host alone."""
        own = urlsplit(self.location)
        if (url.scheme, url.netloc) != (own.scheme, own.netloc):
            return {}
        try:
            found = netrc.netrc(os.environ.get("NETRC")).authenticators(url.hostname or "")
        except (OSError, netrc.NetrcParseError):
            return {}
        if found is None:
            return {}
        pair = base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}

    def _connections(self) -> dict[tuple[str, str], _Connection]:
        mine: Any = self._mine
        if getattr(mine, "process", None) != os.getpid():
            mine.process, mine.connections = os.getpid(), {}
        connections: dict[tuple[str, str], _Connection] = mine.connections
        return connections

    def _connection(self, url: SplitResult) -> _Connection:
        kept = self._connections()
        key = (url.scheme, url.netloc)
        if key not in kept:
            while len(kept) >= _MOST_CONNECTIONS:
                kept.pop(next(iter(kept))).close()
            kept[key] = _Connection(url, self._settings)
        return kept[key]

    def _drop(self, url: SplitResult) -> None:
        connection = self._connections().pop((url.scheme, url.netloc), None)
        if connection is not None:
            with suppress(OSError):
                connection.close()


def _target(url: str, location: str, where: str) -> str:
    """Where a redirect leads. Raises `BadInput` for a place that is none, or not https where `url` was."""
    try:
        target = urlsplit(urljoin(url, location))
        if target.scheme in ("https", urlsplit(url).scheme) and target.hostname and target.port != 0:
            return target.geturl()
    except ValueError:
        pass
    shown = ascii(hide_credentials(location))[1:-1][:_MOST_SHOWN] or "nothing"
    raise BadInput(f"{where}: redirected to {shown}; refused")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _read(response: http.client.HTTPResponse, size: int) -> bytes:
    try:
        return response.read1(size)
    except (OSError, http.client.HTTPException) as error:
        raise Broken(_reason(error)) from None


def _pass_over(response: http.client.HTTPResponse) -> None:
    with suppress(OSError, http.client.HTTPException):
        response.read(_MOST_NOISE_BYTES)


def _content_range(response: http.client.HTTPResponse) -> tuple[int, int, int]:
    """(first byte, last byte, length of the whole file)."""
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None:
        raise Broken("an answer with a part of the file does not say which")
    return int(match[1]), int(match[2]), int(match[3])


def _refusal(response: http.client.HTTPResponse, where: str) -> Exception:
    # Not the server's own words, which may hold anything.
    said = f"HTTP {response.status} {http.client.responses.get(response.status, '')}".rstrip()
    if response.status >= 500 or response.status in _PASSING:
        # Its connection is not kept: another one may lead to a server that is well.
        wait = response.headers.get("Retry-After", "")
        return Broken(said, float(wait) if wait.isdigit() else 0.0)
    _pass_over(response)
    if response.status == 416:
        return WrongSize("fewer bytes at the server")
    return BadInput(f"{where}: {said}; is the URL that of a dataset folder, and may it be read?")
