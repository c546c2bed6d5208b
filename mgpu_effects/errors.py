"""The broker's own errors: one table, one shape. An upstream's own errors pass unchanged."""

from collections.abc import Mapping

from attrs import frozen

from mgpu_core.effects import Reject

# code: HTTP status (http.md section 1).
STATUS: Mapping[str, int] = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "no_consumer": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "upload_timeout": 408,
    "body_too_large": 413,
    "overloaded": 429,
    "bad_consumer_url": 500,
    "internal_error": 500,
    "upstream_disconnected": 502,
    "cancelled": 503,
    "consumer_unreachable": 503,
    "insufficient_vram": 503,
    "load_failed": 503,
    "queue_timeout": 503,
    "scheduler_error": 503,
    "shutting_down": 503,
    "unloaded": 503,
    "upstream_timeout": 504,
}


@frozen(kw_only=True)
class BrokerError(Exception):
    """What a client is told. `retry_after` in seconds, None where nobody can know."""

    code: str
    message: str
    consumer: str | None = None
    retryable: bool = False
    retry_after: int | None = None

    @property
    def status(self) -> int:
        return STATUS[self.code]

    def to_json(self) -> dict[str, object]:
        return {
            "error": self.code,
            "message": self.message,
            "consumer": self.consumer,
            "retryable": self.retryable,
        }


SHUTTING_DOWN = BrokerError(code="shutting_down", message="the broker shuts down", retryable=True)


def of_reject(reject: Reject) -> BrokerError:
    """Give what the client is told of the scheduler's refusal."""
    return BrokerError(
        code=reject.code,
        message=reject.message,
        consumer=reject.consumer,
        retryable=reject.retryable,
        retry_after=reject.retry_after,
    )
