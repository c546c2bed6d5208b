"""A picture that is worth looking at, as a PNG."""

import struct
import zlib
from functools import cache


@cache
def picture(side_px: int, done: float) -> bytes:
    """Give a PNG of a sun over the sea, the more of it the more is `done`."""

    def colour(x: float, y: float) -> tuple[int, int, int]:
        glow = max(0.0, 1 - 3 * ((x - 0.5) ** 2 + (y - 0.55) ** 2) ** 0.5)
        sun = (x - 0.5) ** 2 + (y - 0.55) ** 2 < 0.01
        if y > 0.62:
            return int(20 + 120 * glow), int(40 + 60 * glow), int(90 + 20 * glow)
        return (255, 220, 120) if sun else (int(60 + 195 * glow), int(40 + 110 * glow), 110)

    rows = bytearray()
    for row in range(side_px):
        rows.append(0)
        for column in range(side_px):
            shown = row < done * side_px
            rows += bytes(colour(column / side_px, row / side_px) if shown else (24, 24, 28))
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    pieces = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in pieces
    )
