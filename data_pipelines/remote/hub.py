"""Files of a repository on the Hugging Face Hub, by ranges, through huggingface_hub's own session, headers and token.

Not through its HfFileSystem, which asks the Hub's API for the repository and for the listing of every folder that it
opens a file in: with many shards and a process for each of many workers, that is more than the Hub answers.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from data_pipelines.errors import BadInput

_PATH = re.compile(
    r"(?:(?P<kind>dataset|model|space)s/)?(?P<name>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?/(?P<path>.+)"
)
_OUT_OF_RANGE = 416
_PARTIAL = 206


class HubFiles:
    """What `ObjectFolder` needs of a filesystem. Paths are as in hf:// URLs: datasets/OWNER/NAME[@REVISION]/PATH."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds

    @property
    def endpoint(self) -> str:
        """The URL of the Hub that the client talks to."""
        from huggingface_hub import constants

        return constants.ENDPOINT

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, fewer where the file ends before.

        Raises `BadInput` for what is no path in a repository, and the client's errors.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        match = _PATH.fullmatch(path)
        if match is None:
            raise BadInput(f"hf://{path}: not in a repository; give hf://datasets/OWNER/NAME")
        revision = unquote(match["revision"]) if match["revision"] else None
        url = hf_hub_url(
            match["name"], match["path"], repo_type=match["kind"], revision=revision, endpoint=self.endpoint
        )
        # Compressed, the range would be one of other bytes.
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=self._timeout_seconds) as response:
            if response.status_code == _OUT_OF_RANGE:
                return b""
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > end - start or (start and response.status_code != _PARTIAL):
                    raise BadInput(f"hf://{path}: {self.endpoint} does not serve ranges")
        return bytes(data)
