"""A request's path, made plain before anything is decided by it."""

from urllib.parse import unquote_to_bytes

from mgpu_effects.errors import BrokerError


def normalise(raw_path: bytes) -> bytes:
    """Resolve `.`, `..` and empty segments, encoded ones too; all else stays as it came.

    Raises `bad_request` where the path climbs over the root, or hides a climb, a backslash or a
    control character behind an encoding that only the service behind us would undo.
    """
    kept: list[bytes] = []
    segments = raw_path.split(b"/")
    for segment in segments:
        plain = unquote_to_bytes(segment)
        if plain == b"..":
            if not kept:
                raise BrokerError(code="bad_request", message="the path climbs over its root")
            kept.pop()
        elif b".." in plain.replace(b"\\", b"/").split(b"/") or min(plain, default=32) < 32:
            raise BrokerError(code="bad_request", message="the path holds an encoded climb")
        elif plain not in {b"", b"."}:
            kept.append(segment)
    ends_in_directory = kept and unquote_to_bytes(segments[-1]) in {b"", b".", b".."}
    return b"/" + b"/".join(kept) + (b"/" if ends_in_directory else b"")


def with_query(path: str, query: bytes) -> str:
    """Append the client's query to a path that may have one of its own."""
    if not query:
        return path
    return f"{path}{'&' if '?' in path else '?'}{query.decode('ascii')}"
