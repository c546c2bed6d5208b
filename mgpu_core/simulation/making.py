"""Configurations and traffic, drawn: from nobody on no card to a dozen on several."""

from collections.abc import Sequence

from attrs import evolve, frozen

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu, config_of
from mgpu_core.simulation.chance import Chance, likely, pick
from mgpu_core.simulation.faults import CALM, Faults, swarm
from mgpu_core.simulation.themes import ANYTHING, THEMES, Theme, Way
from mgpu_core.simulation.world import (
    CARD_MIB,
    Act,
    Ask,
    BrokerCrash,
    Busy,
    ClockStops,
    Foreign,
    Script,
)

NAMES = "abcdefghijkl"
FOREVER_US = 10**6 * SECOND_US
# The longest wait in a run that need not end by itself: the second phase lasts longer.
LONGEST_WAIT_US = 600 * SECOND_US


@frozen(kw_only=True)
class Setting:
    """One run to be: a configuration and what happens to it. `fair`: nothing is in anybody's way
    for ever, so that each wait must end by itself. `replayed`: its log is played again at the end,
    which costs as much as the run. `calm`: nothing goes wrong at all, and sizes are as declared.
    """

    config: Config
    script: Script
    faults: Faults
    fair: bool
    replayed: bool = True
    calm: bool = False


def draw_theme(chance: Chance) -> Theme:
    return pick(chance, tuple(THEMES.values())) if likely(chance, 600) else ANYTHING


def draw_faults(chance: Chance, theme: Theme) -> Faults:
    """Draw what goes wrong; where a run has a theme, mostly that and nothing else."""
    anything = swarm(chance)
    alone = theme is not ANYTHING and likely(chance, 700)
    return (CALM if alone else anything).at_least(theme.faults)


def draw_config(chance: Chance, *, fair: bool, theme: Theme = ANYTHING) -> Config:
    cards = pick(chance, theme.cards)
    names = NAMES[: pick(chance, theme.consumers)]
    gpus = tuple(
        Gpu(
            index=index,
            total_mib=pick(chance, (24_000, 24_000, 24_000, 16_000 if not fair else 24_000, None)),
            cushion_mib=pick(chance, (256, 0, 3_000)),
            max_parallel=pick(chance, theme.parallel),
        )
        for index in range(cards)
    )
    habits = _Habits.drawn(chance, names, theme, fair=fair)
    consumers = [_consumer(chance, name, cards, habits, fair=fair) for name in names]
    return config_of(
        *consumers,
        gpus=gpus,
        eviction=pick(chance, ("lru", "lru", "gdsf")),
        overtake_bound=pick(chance, (2, 1, 8, None)),
        max_evictions=5 if fair else pick(chance, (5, 5, 2, 1)),
        when_unfit=pick(chance, ("wait", "wait", "reject", "admit")) if not fair else "wait",
        overlap_loads=not likely(chance, 200),
        queue_timeout_us=FOREVER_US if fair else pick(chance, (300, 60, 30)) * SECOND_US,
        # In a fair setting one server's commands may wait for each other without a time-out.
        load_timeout_us=pick(chance, (300, 200) if fair else (60, 20, 300)) * SECOND_US,
        unload_timeout_us=pick(chance, (120, 200) if fair else (20, 5, 60)) * SECOND_US,
        settle_timeout_us=pick(chance, (10, 3)) * SECOND_US,
        restore_after_us=pick(chance, (None, None, 30 * SECOND_US)),
        poll_interval_us=pick(chance, (2, 5, 10)) * SECOND_US,
        probe_interval_us=pick(chance, (10, 5, 30)) * SECOND_US,
    )


@frozen(kw_only=True)
class _Habits:
    """What the consumers of one configuration have in common.

    Much goes wrong only between services of the same size, or of one server: by chance alone they
    would hardly ever be so. `rack` are those of the one server, and how it is loaded and stopped.
    """

    theme: Theme
    sizes_mib: tuple[int, ...]
    friends: tuple[str, ...]
    rack: tuple[str, ...]
    rack_mib: tuple[int, ...]
    way: Way
    server_concurrency: int | None

    @classmethod
    def drawn(cls, chance: Chance, names: Sequence[str], theme: Theme, *, fair: bool) -> "_Habits":
        racks = likely(chance, theme.rack)
        rack = [name for name in names if likely(chance, theme.racked)] if racks else []
        friends = [name for name in names if not fair and likely(chance, theme.friends)]
        few = pick(chance, theme.few) or len(theme.sizes_mib)
        sizes_mib = tuple(pick(chance, theme.sizes_mib) for _ in range(few))
        return cls(
            theme=theme,
            sizes_mib=sizes_mib,
            rack_mib=pick(chance, theme.rack_sizes_mib) or sizes_mib,
            friends=tuple(friends[:2]),
            rack=tuple(rack[:3]),
            way=pick(chance, theme.rack_ways),
            server_concurrency=pick(chance, theme.rack_concurrency),
        )


def _consumer(chance: Chance, name: str, cards: int, habits: _Habits, *, fair: bool) -> Consumer:
    theme, racked = habits.theme, name in habits.rack
    ways = [way for way in theme.ways if not fair or way[1] or way[2] != "none"]
    load_route, unload_route, driver = habits.way if racked else pick(chance, ways)
    each = [gpu for gpu in range(cards) if likely(chance, theme.on_each_card)]
    used = each or [chance.randint(0, cards - 1)]
    if likely(chance, theme.on_processor):
        used = []  # on the processor
    size = pick(chance, habits.rack_mib if racked else habits.sizes_mib)
    friendly = habits.friends and likely(chance, theme.befriended)
    return Consumer(
        name=name,
        server="rack" if racked else name,
        server_concurrency=habits.server_concurrency if racked else None,
        vram_mib={gpu: min(size, 18_000) if fair else size for gpu in used},
        vram_load_mib=pick(chance, theme.peaks_mib),
        vram_residue_mib=pick(chance, (0, 0, 400)),
        vram_auto=likely(chance, theme.auto) and (size > 0 or not fair),
        vram_managed=not fair and likely(chance, theme.managed),
        gpu_slot=not likely(chance, 150),
        load_route=load_route,
        unload_route=unload_route,
        driver=driver,
        can_coexist_with=tuple(one for one in habits.friends if one != name) if friendly else (),
        priority=pick(chance, (2, 2, 0, 4)),
        max_concurrency=pick(chance, (2, 10, 1) if racked else theme.concurrency),
        max_pending=pick(chance, theme.max_pending),
        pinned=not fair and likely(chance, theme.pinned_in_rack if racked else theme.pinned),
        preload=likely(chance, 200),
        idle_unload_us=pick(chance, (None, 20 * SECOND_US, None if not racked else 5 * SECOND_US)),
    )


def draw_script(
    chance: Chance, config: Config, faults: Faults, *, acts: int, theme: Theme = ANYTHING
) -> Script:
    """Draw who comes when, and what else happens; the waits between are short and long ones."""
    names = tuple(config.consumers) or ("nobody",)
    script: list[tuple[int, Act]] = []
    at = 500_000  # by then, the first probes have told what they can
    hurry_us = pick(chance, theme.hurry_ms) * 1_000
    # The more of them ask for one service, the more there are to overtake the others.
    liked, share = pick(chance, names), pick(chance, (0, 0, 300, 700))
    for _ in range(acts):
        at += chance.randint(0, 20) * hurry_us // 10
        if likely(chance, 30):
            at += pick(chance, (30, 90)) * SECOND_US
        script += ((at + later, act) for later, act in _other_acts(chance, config, names, faults))
        asked = (liked,) if likely(chance, share) else names
        script.append((at, _ask(chance, asked, faults, theme)))
    return tuple(sorted(script, key=lambda item: item[0]))


def _ask(chance: Chance, names: Sequence[str], faults: Faults, theme: Theme) -> Ask:
    leaves = likely(chance, faults.client_leaves)
    return Ask(
        consumer=pick(chance, names),
        work_us=pick(chance, (1_000, 200, 5_000, 20_000)) * 1_000,
        priority=pick(chance, (None, None, None, 0, 2, 4)),
        patience_us=pick(chance, (chance.randint(0, 100) * 200_000, 2_000_000)) if leaves else None,
        deadline_us=_deadline_us(chance) if likely(chance, theme.deadlines) else None,
    )


def _deadline_us(chance: Chance) -> int:
    """Most are short; some ask for longer than anybody may wait."""
    return pick(chance, (chance.randint(1, 30), 400)) * SECOND_US


def _other_acts(
    chance: Chance, config: Config, names: Sequence[str], faults: Faults
) -> list[tuple[int, Act]]:
    """Draw what else happens about then: microseconds later, and what."""
    acts: list[tuple[int, Act]] = []
    if likely(chance, faults.foreign // 3):
        gpu = chance.randint(0, max(0, len(config.gpus) - 1))
        acts.append((0, Foreign(gpu=gpu, mib=pick(chance, (6_000, 2_000, 15_000)))))
        acts.append((chance.randint(1, 60) * SECOND_US, Foreign(gpu=gpu, mib=0)))
    if likely(chance, faults.busy // 3):
        name = pick(chance, names)
        acts.append((0, Busy(consumer=name, us=chance.randint(1, 30) * SECOND_US)))
        if likely(chance, faults.operator):
            acts.append((chance.randint(1, 20) * SECOND_US, ev.Unload(at=0, consumers=(name,))))
    if likely(chance, faults.operator // 2):
        acts.append((0, _operator(chance, names)))
    if likely(chance, faults.reconfigured // 4):
        acts.append((0, ev.Reconfigured(at=0, config=draw_changed(chance, config))))
        acts.append((20 * SECOND_US, ev.Reconfigured(at=0, config=config)))
    if likely(chance, faults.broker_crashes // 10):
        acts.append((0, BrokerCrash(down_us=chance.randint(1, 20) * 500_000)))
    if likely(chance, faults.clock_stops // 6):
        acts.append((0, ClockStops(us=chance.randint(1, 20) * SECOND_US)))
    if likely(chance, faults.operator // 20):
        acts += [(0, ev.Drain(at=0)), (chance.randint(1, 10) * SECOND_US, ev.Resume(at=0))]
    return acts


def _operator(chance: Chance, names: Sequence[str]) -> ev.Event:
    name = pick(chance, names)
    acts: tuple[ev.Event, ...] = (
        ev.Unload(at=0, consumers=(name,)),
        ev.Unload(at=0, consumers=(name,), force=True),
        ev.Unload(at=0, consumers=(name,), force=True),
        ev.Unload(at=0),
        ev.Load(at=0, consumer=name),
        ev.Load(at=0, consumer=name, only_if_free=True),
        ev.Pin(at=0, consumer=name, pinned=True),
        ev.Pin(at=0, consumer=name, pinned=False),
    )
    return pick(chance, acts)


def draw_changed(chance: Chance, config: Config) -> Config:
    """Draw what an operator makes of a file: one is gone, or new, or has other limits."""
    consumers = dict(config.consumers)
    what = pick(chance, (0, 0, 1, 2, 3, 4))
    if consumers and what == 0:
        del consumers[pick(chance, tuple(consumers))]
    elif consumers and what == 1:
        name = pick(chance, tuple(consumers))
        consumers[name] = evolve(consumers[name], max_concurrency=1, max_pending=5)
    elif what == 2:
        gpus = {index: evolve(gpu, max_parallel=1) for index, gpu in config.gpus.items()}
        return evolve(config, gpus=gpus)
    elif what == 3:
        racked = [name for name, one in consumers.items() if one.server == "rack"]
        consumers |= {name: evolve(consumers[name], server_concurrency=1) for name in racked}
    else:
        consumers["new"] = Consumer(
            name="new", vram_mib={0: 4_000}, load_route=True, unload_route=True
        )
    return evolve(config, consumers=consumers)


def draw_setting(
    chance: Chance,
    faults: Faults,
    *,
    fair: bool,
    acts: int,
    config: Config | None = None,
    theme: Theme = ANYTHING,
) -> Setting:
    """Draw a run; with a configuration of somebody's own, what happens to that."""
    if config is None:
        config = draw_config(chance, fair=fair, theme=theme)
    else:
        fair = fair and not unfair_because(config)
        config = own_reading(config, fair=fair)
    if fair and any(one.vram_auto for one in config.consumers.values()):
        # What a stranger takes during a load is measured as its own, and may never fit again.
        faults = evolve(faults, foreign=0, sample_wrong=0)
    script = draw_script(chance, config, faults, acts=acts, theme=theme)
    replayed = likely(chance, theme.replayed)
    return Setting(config=config, script=script, faults=faults, fair=fair, replayed=replayed)


def draw_calm(
    chance: Chance,
    faults: Faults,
    *,
    acts: int,
    config: Config | None = None,
    theme: Theme = ANYTHING,
) -> Setting:
    """Draw a fair run in which nothing goes wrong; a client may leave.

    It begins once all services have told how they are. A configuration of somebody's own that
    can't be held to its sizes has an ordinary run.
    """
    if config is not None and (unfair_because(config) or not _is_plain(config)):
        return draw_setting(chance, faults, fair=False, acts=acts, config=config, theme=theme)
    drawn = draw_config(chance, fair=True, theme=theme)
    plain = own_reading(_plain(drawn) if config is None else config, fair=True)
    # Whose client leaves may load on, and nobody knows for how long.
    lazy = any(one.lazy for one in plain.consumers.values())
    calm = Faults(client_leaves=0 if lazy else faults.client_leaves)
    script = draw_script(chance, plain, calm, acts=acts, theme=theme)
    later = tuple((at + SECOND_US, act) for at, act in script)
    return Setting(config=plain, script=later, faults=calm, fair=True, calm=True)


def _plain(config: Config) -> Config:
    """Make every size known and true, and every service tell of itself who is in."""
    gpus = {index: evolve(gpu, total_mib=CARD_MIB) for index, gpu in config.gpus.items()}
    consumers = {
        name: evolve(one, vram_auto=False, server=name) for name, one in config.consumers.items()
    }
    return evolve(config, gpus=gpus, consumers=consumers)


def _is_plain(config: Config) -> bool:
    return (
        config.when_unfit != "admit"
        and all(gpu.total_mib is not None for gpu in config.gpus.values())
        and not any(one.vram_auto or one.can_coexist_with for one in config.consumers.values())
        and not any(config.siblings.values())
    )


# ------------------------------------------------------------------ a configuration of one's own


def own_reading(config: Config, *, fair: bool) -> Config:
    """Take a configuration with time limits under which a run can be judged.

    Fair: no wait is cut short, so that it shows whether all end by themselves. Else: as they are,
    but that no wait lasts longer than a run.
    """
    if not fair:
        return evolve(config, queue_timeout_us=min(config.queue_timeout_us, LONGEST_WAIT_US))
    return evolve(
        config,
        queue_timeout_us=FOREVER_US,
        load_timeout_us=max(config.load_timeout_us, 300 * SECOND_US),
        unload_timeout_us=max(config.unload_timeout_us, 200 * SECOND_US),
    )


def unfair_because(config: Config) -> tuple[str, ...]:
    """Say what may keep somebody waiting for ever by the configuration itself, however it is run.

    Of each consumer: whom nothing may unload for it, or too many to unload at once. It errs on the
    careful side: what is told here need not happen.
    """
    return tuple(
        reason
        for target in config.consumers.values()
        if not target.vram_managed
        for gpu in target.vram_mib
        if (reason := _unfair_on(config, target, gpu))
    )


def _unfair_on(config: Config, target: Consumer, gpu: int) -> str | None:
    settings = config.gpus.get(gpu, Gpu(index=gpu))
    room_mib = (settings.total_mib or CARD_MIB) - settings.reserved_mib - settings.cushion_mib
    if target.vram_auto and not target.vram_mib[gpu]:
        return f"what {target.name} takes on GPU {gpu} is measured only once it runs"
    need_mib = max(target.vram_mib[gpu], target.vram_load_mib)
    if not need_mib or need_mib > room_mib:
        return None  # nobody has to go for it; or it is refused at once
    others = [one for one in config.consumers.values() if one is not target]
    beside = [one for one in others if gpu in one.vram_mib and not one.vram_managed]
    staying = [one for one in beside if not _may_go_for(config, target, one)]
    left_mib = sum(one.vram_residue_mib for one in beside if one not in staying)
    if need_mib + left_mib + sum(one.vram_mib[gpu] for one in staying) > room_mib:
        names = ", ".join(one.name for one in staying) or "what unloads leave behind"
        return f"{target.name} does not fit beside what can't be unloaded for it ({names})"
    if len(beside) - len(staying) > config.max_evictions:
        return f"for {target.name} more may have to go than max_evictions ({config.max_evictions})"
    return None


def _may_go_for(config: Config, target: Consumer, other: Consumer) -> bool:
    siblings = () if other.unload_route else config.siblings[other.name]
    going = [other, *(config.consumers[name] for name in siblings)]
    return other.unloadable and not any(
        one.vram_managed or one.name in target.can_coexist_with for one in going
    )
