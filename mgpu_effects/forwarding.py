"""What of a request and its answer passes the broker: where it goes, and with which headers."""

from collections.abc import Iterator
from functools import lru_cache

from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from mgpu_effects.jobs import Headers, Job
from mgpu_effects.settings import ConsumerSettings

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# What is the broker's own to say: the body is whole by now, and Host is the upstream's.
REPLACED = frozenset(
    {b"content-length", b"expect", b"host", b"x-forwarded-host", b"x-forwarded-proto"}
)


def url_of(job: Job, consumer: ConsumerSettings) -> URL:
    """Give where the job goes; raises `aiohttp.InvalidURL` or ValueError for what is no URL."""
    return _parsed(consumer.url.rstrip("/") + job.path)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> URL:
    """Take it as it is: most requests go to a few addresses."""
    return URL(text, encoded=True)


def request_headers(job: Job, consumer: ConsumerSettings) -> CIMultiDict[str]:
    """Give the client's headers less what ends or is replaced here, then the configured ones."""
    headers = CIMultiDict(
        (_text(name), _text(value))
        for name, value in _end_to_end(job.headers)
        if name.lower() not in REPLACED
    )
    if job.body.size:
        headers[hdrs.CONTENT_LENGTH] = str(job.body.size)
    if job.client is not None:
        headers[hdrs.X_FORWARDED_FOR] = ", ".join(
            [*headers.popall(hdrs.X_FORWARDED_FOR, ()), job.client]
        )
    if job.copy is not None:
        headers[hdrs.ACCEPT_ENCODING] = "identity"  # the broker reads it too
    headers[hdrs.X_FORWARDED_PROTO] = job.scheme
    if job.host is not None:
        headers[hdrs.X_FORWARDED_HOST] = job.host
    for name, value in consumer.headers.items():
        headers[name] = value
    return headers


def response_headers(job: Job, raw_headers: Headers) -> Headers:
    """Give the service's headers and those that say how long the broker took."""
    granted = job.submitted if job.granted is None else job.granted
    return [
        *_end_to_end(raw_headers),
        (b"x-mgpu-request", job.request.encode()),
        (b"x-mgpu-consumer", job.consumer.encode()),
        (b"x-mgpu-queue-ms", b"%d" % ((granted - job.submitted) // 1000)),
        (b"x-mgpu-load-ms", b"%d" % (job.loading_us // 1000)),
    ]


def _end_to_end(headers: Headers) -> Iterator[tuple[bytes, bytes]]:
    """Leave out what is for one connection only, and what is between a client and a broker."""
    named = frozenset(
        token.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for token in value.split(b",")
    )
    for name, value in headers:
        lower = name.lower()
        if lower not in HOP_BY_HOP and lower not in named and not lower.startswith(b"x-mgpu-"):
            yield name, value


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
