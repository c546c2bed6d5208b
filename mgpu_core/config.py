"""What the scheduler decides by. No URL, path, header, body or command is in here.

The runtime makes it from the user's file; the event log holds it as it is.
"""

from collections.abc import Hashable, Mapping
from typing import Any, Literal

from attrs import Factory, evolve, field, frozen

SECOND_US = 1_000_000

Eviction = Literal["lru", "gdsf"]
WhenUnfit = Literal["wait", "reject", "admit"]
# Who runs the process behind a consumer: nobody here, a unit of the system, or the broker itself.
Driver = Literal["none", "systemd", "process", "container"]


@frozen(kw_only=True)
class Gpu:
    """One card. `max_parallel` None: as many consumers at work as like to."""

    index: int = 0
    total_mib: int | None = None
    reserved_mib: int = 0
    cushion_mib: int = 256
    max_parallel: int | None = 1


@frozen(kw_only=True)
class Consumer:
    """One thing that is loaded and unloaded as a whole.

    `vram_mib` maps the index of each card it uses to what it holds there (0: not known);
    empty means that it works on the processor and needs neither memory nor a slot.
    """

    name: str
    server: str = field(default=Factory(lambda self: self.name, takes_self=True))
    server_concurrency: int | None = None
    vram_mib: Mapping[int, int] = field(factory=lambda: {0: 0})
    vram_load_mib: int = 0
    vram_residue_mib: int = 0
    vram_auto: bool = False
    vram_managed: bool = False
    gpu_slot: bool = True
    load_route: bool = False
    unload_route: bool = False
    driver: Driver = "none"
    can_coexist_with: tuple[str, ...] = ()
    priority: int = 2
    max_concurrency: int = 1
    max_pending: int = 64
    pinned: bool = False
    preload: bool = False
    idle_unload_us: int | None = None
    # Who has the same is the same to the accounting of memory, as long as it holds none.
    footprint: Hashable = field(init=False, eq=False, repr=False)

    @footprint.default
    def _footprint(self) -> Hashable:
        needs = () if self.vram_managed else (*self.vram_mib.items(), self.vram_load_mib)
        return (needs, tuple(self.vram_mib), self.can_coexist_with)

    @property
    def lazy(self) -> bool:
        """It takes its memory with its first request: it can be emptied but not told to load."""
        return not self.load_route and (self.unload_route or self.driver == "none")

    @property
    def loadable(self) -> bool:
        """Somebody can be told to bring it up, so that it gets a `StartLoad`."""
        return self.load_route or self.driver != "none"

    @property
    def unloadable(self) -> bool:
        return self.unload_route or self.driver != "none"

    @property
    def startable(self) -> bool:
        """A driver can start its process: it need not answer yet."""
        return self.driver != "none"


@frozen(kw_only=True)
class Config:
    """Everything the core needs to know, in integers: MiB, microseconds, counts."""

    consumers: Mapping[str, Consumer]
    gpus: Mapping[int, Gpu] = field(factory=lambda: {0: Gpu()})
    eviction: Eviction = "lru"
    overtake_bound: int | None = 8
    max_evictions: int = 5
    when_unfit: WhenUnfit = "wait"
    overlap_loads: bool = True
    queue_timeout_us: int = 300 * SECOND_US
    load_timeout_us: int = 300 * SECOND_US
    unload_timeout_us: int = 60 * SECOND_US
    settle_timeout_us: int = 10 * SECOND_US
    restore_after_us: int | None = None
    poll_interval_us: int = 2 * SECOND_US
    probe_interval_us: int = 5 * SECOND_US
    probe_failures: int = 2
    # The other consumers of each one's server.
    siblings: Mapping[str, tuple[str, ...]] = field(init=False, eq=False, repr=False)

    @siblings.default
    def _siblings(self) -> Mapping[str, tuple[str, ...]]:
        servers: dict[str, list[str]] = {}
        for name, consumer in self.consumers.items():
            servers.setdefault(consumer.server, []).append(name)
        return {
            name: tuple(other for other in servers[consumer.server] if other != name)
            for name, consumer in self.consumers.items()
        }

    # Who uses a card that each one uses, itself among them.
    sharing: Mapping[str, frozenset[str]] = field(init=False, eq=False, repr=False)

    @sharing.default
    def _sharing(self) -> Mapping[str, frozenset[str]]:
        users: dict[tuple[int, ...], set[str]] = {}
        for name, consumer in self.consumers.items():
            users.setdefault(tuple(consumer.vram_mib), set()).add(name)
        shared = {
            cards: frozenset(
                name for other, names in users.items() if set(other) & set(cards) for name in names
            )
            for cards in users
        }
        return {name: shared[tuple(one.vram_mib)] for name, one in self.consumers.items()}


def in_order(config: Config) -> Config:
    """Sort it: no decision may depend on the order in which somebody wrote it down."""
    return evolve(
        config,
        consumers=dict(sorted(config.consumers.items())),
        gpus=dict(sorted(config.gpus.items())),
    )


def config_of(*consumers: Consumer, gpus: tuple[Gpu, ...] = (Gpu(),), **settings: Any) -> Config:
    """Make a configuration from lists."""
    return in_order(
        Config(
            consumers={consumer.name: consumer for consumer in consumers},
            gpus={gpu.index: gpu for gpu in gpus},
            **settings,
        )
    )
