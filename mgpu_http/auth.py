"""Who may do what: keys, and on loopback without keys the names that a browser may come by.

Keys are long random tokens, so their SHA-256 is kept: nothing slower guards them better.
"""

import base64
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Literal
from urllib.parse import urlsplit

from attrs import frozen
from starlette.datastructures import Headers

from mgpu_effects.errors import BrokerError
from mgpu_effects.settings import AuthKey, Settings

Access = Literal["open", "client", "admin"]

LOOPBACK_NAMES = {"localhost"}
# Credentials are for the broker; what an upstream needs stands in its consumer's `headers`.
CREDENTIALS = {b"authorization", b"x-api-key"}


@frozen(kw_only=True)
class Caller:
    """Who asks. `key` None: somebody on a host where no key is needed."""

    key: AuthKey | None = None


NOBODY = Caller()


def new_key() -> str:
    return f"mgpu_{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """Give what stands in the configuration for a key: its SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def identify(settings: Settings, headers: Headers, access: Access) -> Caller:
    """Find out who asks; raises `unauthorized` or `forbidden` where that is not enough."""
    auth = settings.auth
    if not auth.keys:
        return NOBODY
    if access == "open" or auth.open:
        return Caller(key=_known_key(auth.keys, headers))
    key = _known_key(auth.keys, headers)
    if key is None:
        raise BrokerError(
            code="unauthorized",
            message="a key is needed: `Authorization: Bearer KEY`, `X-Api-Key: KEY`, or a password",
        )
    if access == "admin" and not key.admin:
        raise BrokerError(code="forbidden", message=f"key {key.name} is no admin key")
    return Caller(key=key)


def _known_key(keys: Iterable[AuthKey], headers: Headers) -> AuthKey | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    offer = OFFERS.get(scheme.lower())
    offered = [offer(token.strip()) if offer else "", headers.get("x-api-key", "")]
    hashes = [hash_key(key) for key in offered if key]
    matching = [
        key for key in keys for hashed in hashes if hmac.compare_digest(hashed, key.hash.lower())
    ]
    return matching[0] if matching else None


def _password(token: str) -> str:
    """Give the password of HTTP's basic scheme; the user's name may be anything."""
    try:
        return base64.b64decode(token, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


# By scheme, how the key stands in `Authorization`. Browsers and clients that know nothing of keys
# can send a password: those ask a person for it, these take it from http://any:KEY@host.
OFFERS: Mapping[str, Callable[[str], str]] = {"bearer": str, "basic": _password}


def check_names(settings: Settings, headers: Headers) -> None:
    """Refuse a foreign `Host` or `Origin` where no key protects: a page of any site could come
    by a name of its own that points here (DNS rebinding). Raises `forbidden`.
    """
    if settings.auth.keys or settings.auth.open:
        return
    host = headers.get("host", "")
    if not _is_ours(host, settings.allowed_hosts):
        raise BrokerError(code="forbidden", message=f"host {host!r} is not among `allowed_hosts`")
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}" and not origin_allowed(settings, origin):
        raise BrokerError(
            code="forbidden", message=f"origin {origin!r} is not among `allowed_origins`"
        )


def is_own_page(host: bytes | None, origin: bytes | None) -> bool:
    """Say whether a page of this very address asks."""
    return host is not None and origin in {b"http://" + host, b"https://" + host}


def origin_allowed(settings: Settings, origin: str) -> bool:
    return origin in settings.allowed_origins


@lru_cache(maxsize=64)
def _is_ours(host: str, allowed: tuple[str, ...]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return host in allowed or name in allowed or is_loopback(name)


def is_loopback(name: str) -> bool:
    try:
        return name in LOOPBACK_NAMES or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def cors_headers(settings: Settings, headers: Headers) -> dict[bytes, bytes]:
    """Let a page of an allowed origin read the answer."""
    origin = headers.get("origin")
    if origin is None or not origin_allowed(settings, origin):
        return {}
    return {
        b"access-control-allow-origin": origin.encode(),
        b"access-control-expose-headers": b"*",
        b"vary": b"Origin",
    }


def preflight_headers(settings: Settings, headers: Headers) -> dict[str, str]:
    """Answer a page's question whether it may; raises `forbidden` for a foreign one."""
    origin = headers["origin"]
    if not origin_allowed(settings, origin):
        raise BrokerError(
            code="forbidden", message=f"origin {origin!r} is not among `allowed_origins`"
        )
    return {
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
        "Access-Control-Max-Age": "600",
    }
