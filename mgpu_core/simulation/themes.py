"""What a run is about: draws that suit each other.

Much goes wrong only where several unlikely things come together: services of one server, one of
them at work, another forced out. Were every one of them made likely in every run, they would drown
each other. So about half of the runs have a theme in which all that belongs to it is likely.
"""

from collections.abc import Mapping
from typing import TypeAlias

from attrs import frozen

from mgpu_core.config import Driver

# Load route, unload route, driver.
Way: TypeAlias = tuple[bool, bool, Driver]

SIZES_MIB = (4_000, 9_000, 13_000, 18_000, 2_000, 23_000, 0)
# How a service is loaded and unloaded.
WAYS: tuple[Way, ...] = (
    (True, True, "none"),
    (False, True, "none"),
    (True, True, "none"),
    (False, False, "process"),
    (False, False, "systemd"),
    (True, True, "systemd"),
    (False, True, "systemd"),
    (False, False, "none"),
)
# Of a server of several: with a stop all of them go.
RACK_WAYS: tuple[Way, ...] = (
    (True, True, "systemd"),
    (False, False, "process"),
    (True, True, "none"),
    (True, True, "systemd"),
    (False, True, "systemd"),
)
LAZY_WAYS: tuple[Way, ...] = ((False, True, "none"), (False, True, "systemd"))


@frozen(kw_only=True)
class Theme:
    """What is drawn from, one like the other; shares are chances in a thousand.

    As it stands, a run about nothing in particular. `faults` are the rates that faults have at
    least.
    """

    consumers: tuple[int, ...] = (3, 4, 2, 1, 5, 6, 8, 12, 0)
    cards: tuple[int, ...] = (1, 1, 1, 2, 3)
    parallel: tuple[int | None, ...] = (1, 1, 2, None)
    sizes_mib: tuple[int, ...] = SIZES_MIB
    # Of these, as many as are in use at once; 0: all.
    few: tuple[int, ...] = (0, 2, 1)
    peaks_mib: tuple[int, ...] = (0, 0, 0, 11_000)
    ways: tuple[Way, ...] = WAYS
    on_each_card: int = 400
    on_processor: int = 60
    auto: int = 250
    managed: int = 80
    pinned: int = 80
    concurrency: tuple[int, ...] = (1, 1, 2, 10)
    max_pending: tuple[int, ...] = (64, 64, 3)
    # How often there is a server of several, and who lives in it; without sizes, those of all.
    rack: int = 500
    racked: int = 700
    rack_ways: tuple[Way, ...] = RACK_WAYS
    rack_sizes_mib: tuple[tuple[int, ...], ...] = ((4_000, 9_000), ())
    rack_concurrency: tuple[int | None, ...] = (None, 2, 2, 1)
    pinned_in_rack: int = 200
    friends: int = 300
    befriended: int = 400
    # How much time there is between two who come, at most and tenfold that; how many wait so long.
    hurry_ms: tuple[int, ...] = (2_000, 500, 5_000, 200)
    deadlines: int = 80
    replayed: int = 333
    faults: Mapping[str, int] = {}


ANYTHING = Theme()
THEMES: Mapping[str, Theme] = {
    "one server, and operators": Theme(
        consumers=(3, 2, 4),
        rack=1000,
        racked=900,
        rack_ways=((False, False, "process"), (True, False, "systemd"), (True, True, "systemd")),
        rack_sizes_mib=((4_000, 9_000),),
        rack_concurrency=(None, None, 2),
        parallel=(2, None),
        faults={"operator": 600, "busy": 200, "load_fails": 60, "unload_fails": 60},
    ),
    "one server, and leaks": Theme(
        consumers=(4, 3),
        cards=(1,),
        sizes_mib=(9_000, 13_000),
        on_processor=0,
        auto=0,
        rack=1000,
        racked=850,
        rack_ways=((True, True, "systemd"), (False, True, "systemd")),
        rack_sizes_mib=((),),
        rack_concurrency=(None, None, 2),
        parallel=(2, None),
        pinned=0,
        pinned_in_rack=80,
        faults={"unload_keeps": 500, "operator": 200},
    ),
    "one server, and idleness": Theme(
        consumers=(3, 2),
        cards=(1,),
        on_processor=0,
        auto=0,
        rack=1000,
        racked=900,
        rack_ways=((True, False, "systemd"), (False, False, "process")),
        rack_sizes_mib=((4_000, 9_000),),
        pinned=0,
        pinned_in_rack=0,
        hurry_ms=(10_000, 5_000),
        deadlines=0,
        faults={"unload_hangs": 100, "job_crashes": 60},
    ),
    "one large among small": Theme(
        consumers=(4, 3, 5),
        cards=(1,),
        sizes_mib=(9_000, 18_000, 9_000, 4_000),
        on_processor=0,
        auto=0,
        pinned=0,
        rack=700,
        rack_ways=((True, True, "none"), (True, True, "systemd")),
        rack_sizes_mib=((9_000,), (9_000, 4_000)),
        pinned_in_rack=0,
        hurry_ms=(10_000, 5_000),
        faults={"unload_fails": 60, "answered_late": 200},
    ),
    "loads that need more": Theme(
        consumers=(4, 3),
        cards=(1,),
        sizes_mib=(9_000,),
        peaks_mib=(0, 18_000),
        ways=((True, True, "none"), (False, True, "none")),
        on_processor=0,
        auto=0,
        pinned=0,
        rack=0,
        deadlines=0,
        hurry_ms=(2_000, 5_000),
        faults={"unload_keeps": 200, "operator": 200},
    ),
    "limits lowered at work": Theme(
        consumers=(3, 4),
        cards=(1,),
        sizes_mib=(4_000, 2_000),
        on_processor=0,
        managed=300,
        parallel=(3, 2),
        concurrency=(10, 4),
        racked=1000,
        rack_concurrency=(2, 3, None),
        hurry_ms=(500, 1_000, 200),
        faults={"reconfigured": 600},
    ),
    "answers that come again": Theme(
        consumers=(2, 3),
        cards=(1,),
        sizes_mib=(13_000, 18_000),
        few=(1,),
        ways=((True, True, "none"), (True, False, "systemd"), (False, False, "process")),
        on_processor=0,
        auto=0,
        managed=0,
        pinned=0,
        rack=0,
        hurry_ms=(10_000, 5_000),
        deadlines=0,
        faults={"answered_twice": 800, "load_hangs": 30, "unload_hangs": 30},
    ),
    "who can't be believed": Theme(
        consumers=(3, 2, 4),
        cards=(1,),
        sizes_mib=(13_000, 9_000),
        few=(1,),
        on_processor=0,
        hurry_ms=(5_000, 2_000),
        faults={"probe_slow": 800, "probe_lies": 500, "operator": 300, "busy": 300},
    ),
    "friends": Theme(
        consumers=(4, 5),
        cards=(1,),
        sizes_mib=(13_000, 9_000),
        few=(1,),
        on_processor=0,
        auto=0,
        rack=500,
        rack_ways=((True, False, "systemd"), (False, False, "process"), (True, True, "none")),
        rack_sizes_mib=((),),
        pinned=0,
        pinned_in_rack=0,
        friends=1000,
        befriended=600,
    ),
    "loaded by their first request": Theme(
        consumers=(3, 2, 4),
        ways=LAZY_WAYS,
        rack_ways=LAZY_WAYS,
        peaks_mib=(0, 11_000, 18_000),
        few=(1, 2),
        faults={"load_fails": 60, "job_fails": 60, "job_crashes": 60},
    ),
    "measured on two cards": Theme(
        consumers=(3, 4),
        cards=(2,),
        sizes_mib=(9_000, 13_000, 18_000),
        on_each_card=700,
        on_processor=0,
        auto=1000,
        hurry_ms=(5_000, 2_000),
    ),
    "crowds": Theme(
        consumers=(3, 4),
        cards=(1, 1, 2),
        sizes_mib=(13_000, 18_000, 9_000, 4_000),
        few=(1,),
        on_processor=0,
        concurrency=(2, 10, 1),
        parallel=(1, 2, None),
        rack=300,
        deadlines=250,
        hurry_ms=(500, 200, 1_000),
        faults={"load_fails": 60, "client_leaves": 300, "foreign": 100, "unload_fails": 100},
    ),
    "a broker that dies, or reads another file": Theme(
        consumers=(3, 2, 4),
        few=(1,),
        replayed=1000,
        faults={"broker_crashes": 300, "reconfigured": 400},
    ),
}
