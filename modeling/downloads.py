"""Pictures from the network: http and https alone, public machines alone, bounded in size and time.

A service may hand its visitors' addresses to the pipeline. Nobody must be able to make it read from the machine it
runs on or from the network behind it, also not through a redirect or a name that means such a machine.
"""

import ipaddress
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

LOCAL_ADDRESSES = "ARM_HF_LOCAL_ADDRESSES"
"""Environment variable: `1` allows addresses of this machine and of private networks."""

MOST_BYTES = 100 * 10**6
MOST_REDIRECTS = 5
# What servers say of pictures; those that know nothing of a file call it a stream of bytes.
_STREAMS = ("", "application/octet-stream", "binary/octet-stream")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class DownloadError(OSError):
    """Nothing was downloaded; the text says why in one line, without the address."""


def download(address: str, timeout: float | None = 60.0, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the picture at an address, not yet decoded.

    Args:
        address: Starts with `http://` or `https://`.
        timeout: Seconds for the whole of it; `None` waits for ever.
        most_bytes: Size at which it is given up.

    Raises:
        DownloadError: Another scheme; an address of this machine or of a private network, at first or after a redirect;
            no answer in time; an error of the server; more than `most_bytes`; or a text instead of a picture.
    """
    from huggingface_hub.utils import httpx

    until = None if timeout is None else time.monotonic() + timeout
    try:
        url = httpx.URL(address)
        with httpx.Client(timeout=timeout, headers={"Accept-Encoding": "identity"}) as client:
            for _ in range(MOST_REDIRECTS + 1):
                answer = _first_answer(client, url)
                try:
                    if answer.has_redirect_location:
                        url = url.join(answer.headers["location"])
                        continue
                    answer.raise_for_status()
                    return _body(answer, until, timeout, most_bytes)
                finally:
                    answer.close()
    except httpx.TimeoutException as error:
        raise DownloadError(f"the server took longer than {timeout:g} s") from error
    except httpx.HTTPStatusError as error:
        raise DownloadError(f"the server answered {error.response.status_code}") from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise DownloadError(" ".join(str(error).split()) or type(error).__name__) from error
    raise DownloadError(f"more than {MOST_REDIRECTS} redirects")


def is_public(host: str) -> bool:
    """Whether an IP address is one of the public network; what it wraps (IPv4 in IPv6) counts."""
    address: Any = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 6:
        wrapped = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if wrapped is not None:
            address = wrapped
    return bool(address.is_global and not address.is_multicast)


def _first_answer(client: Any, url: Any) -> Any:
    """Open one address, at an IP address that was looked at: a second look-up might give another one."""
    from huggingface_hub.utils import httpx

    if url.scheme not in ("http", "https") or not url.host:
        raise DownloadError(f"only http and https addresses are read, not {url.scheme or 'none'}:")
    if url.userinfo:
        raise DownloadError("addresses with a password are not read")
    failure: Exception | None = None
    for host in _allowed_hosts(url):
        pinned = url.copy_with(host=host)
        headers = {"Host": url.netloc.decode("ascii")}
        request = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": url.host})
        try:
            return client.send(request, stream=True)
        except httpx.ConnectError as error:
            failure = error
    raise failure or DownloadError(f"there is no machine called {url.host!r}")


def _allowed_hosts(url: Any) -> Iterator[str]:
    """Yield what to connect to: the addresses of a name, all of them public; or the name where a proxy looks it up.

    Raises:
        DownloadError: One of them is not public, or the name is unknown.
    """
    if os.environ.get(LOCAL_ADDRESSES) == "1":
        yield url.host
        return
    proxied = url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.host)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        found = list(
            dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM))
        )
    except OSError as error:
        if not proxied:
            raise DownloadError(f"there is no machine called {url.host!r}") from error
        found = []
    if not all(map(is_public, found)):
        raise DownloadError(
            f"{url.host!r} is this machine or one of a private network; set {LOCAL_ADDRESSES}=1 to allow that"
        )
    yield from [url.host] if proxied else found


def _body(answer: Any, until: float | None, timeout: float | None, most_bytes: int) -> bytes:
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _STREAMS and not kind.startswith("image/"):
        raise DownloadError(f"the server sent {kind}, which is no picture")
    said = answer.headers.get("content-length", "")
    received, size = [], int(said) if said.isdigit() else 0
    if size <= most_bytes:
        size = 0
        for chunk in answer.iter_raw():
            received.append(chunk)
            size += len(chunk)
            if size > most_bytes:
                break
            if until is not None and time.monotonic() > until:
                raise DownloadError(f"the server took longer than {timeout:g} s")
    if size > most_bytes:
        raise DownloadError(f"it is larger than {most_bytes / 1e6:.0f} MB; download it yourself and name the file")
    return b"".join(received)
