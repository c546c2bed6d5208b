"""Little sounds: a hum for every text, and what is heard in one."""

import array
import io
import math
import wave

RATE_HZ = 8_000
HUM_HZ = 220
LETTERS_PER_S = 15
MAX_S = 20.0


class SoundError(ValueError):
    """These bytes are no WAV file."""


def spoken(text: str) -> bytes:
    """Give a WAV file, the longer the more there is to say."""
    seconds = min(MAX_S, max(0.2, len(text) / LETTERS_PER_S))
    turn = 2 * math.pi * HUM_HZ / RATE_HZ
    samples = (int(8_000 * math.sin(turn * n)) for n in range(int(RATE_HZ * seconds)))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE_HZ)
        sound.writeframes(array.array("h", samples).tobytes())
    return file.getvalue()


def heard(content: bytes) -> str:
    """Put into words how much was said. Raises SoundError."""
    try:
        with wave.open(io.BytesIO(content)) as sound:
            seconds = sound.getnframes() / sound.getframerate()
    except (wave.Error, EOFError, ZeroDivisionError) as error:
        raise SoundError(str(error)) from error
    return f"Somebody hummed for {seconds:.1f} seconds."
