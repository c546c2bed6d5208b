"""Golden logs: what was decided once, as a log holds it. Each file has its own reason to be here.

`python -m tests.golden.golden NAME SEED` makes one from a simulated run, in today's format.
`python -m tests.golden.golden` replays all of them and prints what they say now.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from mgpu_core.codec import encode_effect, encode_note
from mgpu_core.replay import Record, Replay
from mgpu_effects.event_log import Segment, encode_line, read
from tests.support.logs import header, history, lines

FOLDER = Path(__file__).parent
# It must diverge: one recorded effect is not what was decided.
DIVERGES = FOLDER / "diverges.jsonl"
LOGS = sorted(path for path in FOLDER.glob("*.jsonl") if path != DIVERGES)


def rewritten(path: Path) -> Iterator[bytes]:
    """Give the log with what today's code decides about the same events.

    Headers stay as they are: they are what an earlier version wrote.
    """
    head, *_ = path.read_bytes().partition(b"\n")
    replay = Replay()
    for item in read(path):
        if isinstance(item, Segment):
            replay.begin(item.state)
            yield head + b"\n"
        else:
            assert isinstance(item, Record)
            transition = replay.advance(item)
            assert transition is not None
            effects = [encode_effect(effect) for effect in transition.effects]
            notes = [encode_note(note) for note in transition.notes]
            yield encode_line(item.seq, item.at, item.event, effects, notes)


def main(arguments: list[str]) -> None:
    if arguments:
        name, seed = arguments
        told = history(seed=int(seed), acts=14)
        (FOLDER / f"{name}.jsonl").write_bytes(header(told.states[0]) + b"".join(lines(told.steps)))
        return
    for path in LOGS:
        sys.stdout.write(b"".join(rewritten(path)).decode("ascii"))


if __name__ == "__main__":
    main(sys.argv[1:])
