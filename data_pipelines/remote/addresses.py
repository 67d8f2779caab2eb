"""Which network addresses may be talked to.

A URL in a shared config, or a redirect by a server, must not reach the services of the machine or of its network:
cloud metadata, a neighbour's dashboard. The address that a connection really goes to is the one that is checked, so a
name that resolves differently a moment later gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket

from data_pipelines.errors import BadInput

ALLOW = "data.remote.allow_private_addresses"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# All that the Internet's IPv6 addresses are taken from (RFC 4291); Python calls much outside of it global, too.
_UNICAST = ipaddress.IPv6Network("2000::/3")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet; an IPv4 address inside an IPv6 one is what counts."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is None and found not in _UNICAST:
            return False
        found = inner or found
    return found.is_global and not found.is_multicast


def allowed_addresses(host: str, port: int, allow_private: bool) -> list[tuple[socket.AddressFamily, str]]:
    """(family, address) of the host's addresses that may be connected to.

    Raises `BadInput` when there are none, and `OSError` when the name cannot be resolved now.
    """
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise BadInput(f"{host}: no such host") from None
        raise
    except UnicodeError:
        raise BadInput(f"{host}: not a host's name") from None
    found: list[tuple[socket.AddressFamily, str]] = [(family, str(address[0])) for family, _, _, _, address in answers]
    allowed: list[tuple[socket.AddressFamily, str]] = [
        (family, address) for family, address in found if allow_private or is_public(address)
    ]
    if not allowed:
        raise refused(host, found[0][1])
    return allowed


def refused(host: str, address: str) -> BadInput:
    """What is said of an address that may not be talked to."""
    where = address if host == address else f"{host}: {address}"
    return BadInput(f"{where} is a private, loopback or link-local address; {ALLOW}: true allows it")


def connect(host: str, port: int, timeout: float, allow_private: bool) -> socket.socket:
    """A TCP connection to an allowed address of `host`; raises as `allowed_addresses` does, and `OSError`."""
    failure: OSError | None = None
    for family, address in allowed_addresses(host, port, allow_private):
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.connect((address, port))
            return connection
        except OSError as error:
            connection.close()
            failure = error
    assert failure is not None
    raise failure
