import time

from mgpu_effects.clock import Clock


class Source:
    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


def test_counts_microseconds_since_the_epoch():
    before = time.time_ns() // 1000
    now = Clock().now()
    assert before <= now <= time.time_ns() // 1000 + 1000


def test_a_jump_of_the_wall_clock_does_not_reach_it():
    wall, monotonic = Source(1_780_000_000_000_000_000), Source(50_000_000_000)
    clock = Clock(wall, monotonic)
    assert clock.now() == 1_780_000_000_000_000
    wall.now_ns -= 3_600_000_000_000
    monotonic.now_ns += 2_000_000
    assert clock.now() == 1_780_000_000_002_000
    wall.now_ns += 9_000_000_000_000
    assert clock.now() == 1_780_000_000_002_000


def test_never_goes_back():
    clock = Clock()
    times = [clock.now() for _ in range(10_000)]
    assert times == sorted(times)
