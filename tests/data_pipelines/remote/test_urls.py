"""Which URLs and addresses are allowed, and that nothing shown holds credentials."""

from __future__ import annotations

import pytest

from data_pipelines.errors import BadInput
from data_pipelines.remote.addresses import allowed_addresses, is_public
from data_pipelines.remote.urls import check_url, hide_credentials, is_url


@pytest.mark.parametrize(
    ("url", "checked"),
    [
        ("https://host/data/", "https://host/data"),
        ("HTTP://Host:8080/a/b", "http://Host:8080/a/b"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("gs://bucket", "gs://bucket"),
        ("hf://datasets/owner/name@main", "hf://datasets/owner/name@main"),
        ("file:///a/b%20c", "file:///a/b%20c"),
    ],
)
def test_allowed_urls_have_one_form(url: str, checked: str) -> None:
    assert is_url(url) and check_url(url) == checked


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "ftp:// is not read; use one of file, http, https, s3, gs, hf"),
        ("pipe://cat", "pipe:// is not read"),
        ("https://me:secret@host/x", "no user name or password in a URL"),
        ("https://host/x?X-Amz-Signature=secret", "has no '?'"),
        ("https://host/x#secret", "has no '?' and no '#' part"),
        ("https://host:99999/x", "not a URL"),
        ("https:///x", "names no host"),
        ("s3:///x", "names no bucket"),
        ("https://host/a b", "white space"),
        ("file://other/x", "file:///path/to/folder"),
    ],
)
def test_other_urls_are_refused_without_showing_secrets(url: str, words: str) -> None:
    assert is_url(url)
    with pytest.raises(BadInput, match=words.replace("?", r"\?").replace("(", r"\(")) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["datasets/mine", "/data/x", "C:\\data", "simplecache::https://host/x", "a:b", ""])
def test_paths_are_no_urls(path: str) -> None:
    assert not is_url(path)


def test_credentials_in_any_text_are_hidden() -> None:
    text = "GET https://u:pw@host/a?token=pw\nfailed: 's3://k:pw@b/c#pw' (https://host/ok)"
    assert hide_credentials(text) == "GET https://host/a failed: 's3://b/c' (https://host/ok)"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::7f00:1", False),
        ("::127.0.0.1", False),
        ("::ffff:0:7f00:1", False),
        ("fec0::1", False),
        ("ff0e::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "::1"])
def test_every_way_to_write_loopback_is_refused(host: str) -> None:
    with pytest.raises(BadInput, match="(private, loopback or link-local|no such host)"):
        allowed_addresses(host, 80, allow_private=False)
    assert allowed_addresses("127.0.0.1", 80, allow_private=True)[0][1] == "127.0.0.1"
