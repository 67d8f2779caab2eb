"""Real servers on the loopback interface: nginx with switches for faults, a proxy that cuts connections, S3, GCS."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

_CONFIG = """
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    log_format facts '$status $uri $http_range $body_bytes_sent';
    access_log {folder}/access.log facts;
    client_body_temp_path {folder}/temp;
    proxy_temp_path {folder}/temp;
    fastcgi_temp_path {folder}/temp;
    uwsgi_temp_path {folder}/temp;
    scgi_temp_path {folder}/temp;
    default_type application/octet-stream;
    absolute_redirect off;
    map $connection $unlucky {{ default 0; "~[159]$" 1; }}
    server {{
        listen 127.0.0.1:{port};
        listen 127.0.0.2:{port};
        root {root};
        if (-f {folder}/slow) {{ set $limit_rate 60k; }}
        if (-f {folder}/slowish) {{ set $limit_rate 1m; }}
        set $ill $unlucky;
        if (!-f {folder}/unreliable) {{ set $ill 0; }}
        if ($ill) {{ return 503; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /neighbour/ {{ rewrite ^/neighbour/(.*)$ http://127.0.0.2:{port}/$1 redirect; }}
        location /elsewhere/ {{ return 302 ftp://127.0.0.1/file; }}
        location /port/ {{ return 302 http://127.0.0.1:99999/file; }}
        location /bracket/ {{ return 302 http://[::1/file; }}
        location /escape/ {{ return 302 "ftp://\x1b[2J@host/"; }}
        location /round/ {{ rewrite ^ /round/again redirect; }}
        location /noranges/ {{ alias {root}/; max_ranges 0; }}
        location /private/ {{ alias {root}/; auth_basic "shards"; auth_basic_user_file {folder}/passwords; }}
    }}
}}
"""


@dataclass(frozen=True)
class Request:
    """One line of nginx's access log."""

    status: int
    path: str
    byte_range: str
    num_bytes: int


class Nginx:
    """A running nginx that serves `root`. A file in `switches` turns a fault on: slow, slowish, unreliable."""

    def __init__(self, port: int, switches: Path) -> None:
        self.port, self.switches, self._asked = port, switches, 0

    def url(self, path: str = "dataset") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def turn(self, name: str, on: bool = True) -> None:
        (self.switches / name).touch() if on else (self.switches / name).unlink()

    def requests(self, ending: str = "") -> list[Request]:
        """What has been asked for so far, of files whose names end like this."""
        # nginx writes a line after the client has its answer; its one process does so before it answers the next.
        self._asked += 1
        last = f"/asked-{self._asked}"
        with suppress(HTTPError), urlopen(f"http://127.0.0.1:{self.port}{last}", timeout=30):
            pass
        found = []
        for line in (self.switches / "access.log").read_text().splitlines():
            status, rest = line.split(" ", 1)
            path, byte_range, num_bytes = rest.rsplit(" ", 2)
            if path.endswith(ending) and not path.startswith("/asked-"):
                found.append(Request(int(status), path, byte_range, int(num_bytes)))
        return found


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> bool:
    for _ in range(600):
        if process.poll() is not None:
            return False
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.05)
    return False


@contextmanager
def running_nginx(root: Path, folder: Path) -> Iterator[Nginx]:
    """nginx that serves the files in `root`, with its own files in `folder`. Skips where there is no nginx."""
    if NGINX is None:
        pytest.skip("no nginx here: apt-get install nginx-light")
    folder.mkdir()
    for _ in range(5):
        port = free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(_CONFIG.format(folder=folder, root=root, port=port, user=user))
        process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")])
        try:
            if _wait_for(port, process):
                (folder / "access.log").write_bytes(b"")
                yield Nginx(port, folder)
                return
        finally:
            process.terminate()
            process.wait(20)
    raise AssertionError((folder / "error.log").read_text())


class CuttingProxy:
    """Passes TCP connections on to a port, and cuts number n after `cut(n)` bytes of answers, unless that is None."""

    def __init__(self, port: int, cut: Callable[[int], int | None]) -> None:
        self._target, self._cut = port, cut
        self.connections = self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(
                    target=self._answers, args=(server, client, self._cut(self.connections)), daemon=True
                ).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _answers(self, server: socket.socket, client: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while data := server.recv(8192 if left is None else min(8192, left)):
                client.sendall(data)
                if left is not None:
                    left -= len(data)
                    if not left:
                        self.cuts += 1
                        break
        for end in (client, server):
            with suppress(OSError):
                # Closing alone would wait for the other thread's recv.
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def running_s3(folder: Path) -> Iterator[str]:
    """The URL of a `moto_server`. Skips where moto is not installed."""
    pytest.importorskip("moto", reason="no moto here: pip install 'triptych[dev]'")
    with _running(folder, "from moto.server import main; main()", "-H", "127.0.0.1", "-p") as url:
        yield url


@contextmanager
def running_gcs(folder: Path) -> Iterator[str]:
    """The URL of a `gcp-storage-emulator` with an empty `bucket`. Skips where it is not installed."""
    pytest.importorskip("gcp_storage_emulator", reason="no gcp-storage-emulator here: pip install 'triptych[dev]'")
    start = "from gcp_storage_emulator.__main__ import main; main()"
    options = ("--in-memory", "--default-bucket", "bucket", "--host", "127.0.0.1", "--port")
    with _running(folder, start, "start", *options) as url:
        yield url


@contextmanager
def _running(folder: Path, start: str, *arguments: str) -> Iterator[str]:
    """The URL of a server that Python code starts, with the port as its last argument; its log is in `folder`."""
    folder.mkdir()
    port = free_port()
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-c", start, *arguments, str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert _wait_for(port, process), (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(20)
