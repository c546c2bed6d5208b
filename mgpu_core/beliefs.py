"""Events that tell what is really so: samples of the cards, and probes of the services."""

from collections.abc import Mapping

from attrs import evolve

from mgpu_core.draft import Draft
from mgpu_core.events import GpuSample, ProbeResult
from mgpu_core.memory import good_card, held_mib
from mgpu_core.state import (
    ABSENT,
    RESIDENT,
    Card,
    ConsumerState,
    Promise,
    Source,
    assumed_residency,
)
from mgpu_core.transitions import Cause


def on_probe(d: Draft, event: ProbeResult) -> None:
    state = d.consumers.get(event.consumer)
    if state is None:
        d.note("Ignored", consumer=event.consumer, what="ProbeResult", because="it is not known")
        return
    if event.taken > d.at:
        event = evolve(event, taken=d.at)
    if state.last_probe is not None and event.taken < state.last_probe:
        d.note(
            "Ignored", consumer=event.consumer, what="ProbeResult", because="older than the last"
        )
        return
    if event.healthy:
        _answered(d, event, state)
    else:
        _failed(d, event, state)


def _answered(d: Draft, event: ProbeResult, state: ConsumerState) -> None:
    """It lives; believe what it says of itself where nothing moved since it was asked."""
    name = event.consumer
    if state.unreachable:
        d.note("Healthy", consumer=name)
    d.update(name, last_probe=event.taken, healthy=True, probe_failures=0, probe_error=event.error)
    quiet = (
        event.taken > state.touched
        and state.operation is None
        and name not in d.serving
        and name not in d.swaps
        and not (d.swaps and any(name in swap.victims for swap in d.swaps.values()))
    )
    if quiet and event.resident is not None:
        _see(d, name, resident=event.resident, source=Source.PROBE)
    elif quiet and state.refused:
        consumer = d.consumer(name)
        assumed = assumed_residency(consumer) is RESIDENT
        # Of several that are loaded by route, none is in when their server has come up again.
        alone = not (consumer.load_route and d.siblings(name))
        _see(d, name, resident=assumed and alone, source=Source.ASSUMED)
    if quiet and state.refused:
        d.update(name, refused=False)  # until then, what it holds after its refusal is not known
    settled = event.taken > state.moved and state.starter is None
    if event.vram_mib and settled and d.consumers[name].residency is RESIDENT:
        d.update(name, measured_mib=event.vram_mib)
    # Until the first look of a run it is taken for busy if the last run left it at work.
    if event.busy is not None or state.last_probe is None:
        d.update(name, busy_seen=event.taken if event.busy else None)


def _see(d: Draft, name: str, *, resident: bool, source: Source) -> None:
    """Take a probe's word for whether it is loaded."""
    state = d.consumers[name]
    believed = RESIDENT if resident else ABSENT
    if state.residency is believed and state.source is source and name not in d.promises:
        return  # that is no news
    if resident:
        if state.cleared:
            return  # it is about to be cold-started: the promise holds until it is
        fresh = state.residency is not RESIDENT
        idle_since = d.at if fresh else state.idle_since
        if state.residency is ABSENT:
            d.update(name, leaky_mib=None)  # it was loaded since, though not by us
        d.move(name, Cause.SEEN_RESIDENT, source, idle_since=idle_since)
    elif state.cleared or _awaits_its_first_request(d, name):
        return
    else:
        d.move(name, Cause.SEEN_ABSENT, source)
        if source is Source.PROBE:  # nobody has seen it empty that is only taken for it
            d.give_up_promise(name)


def _awaits_its_first_request(d: Draft, name: str) -> bool:
    """Its process runs for somebody who waits still for a place there: it may hold nothing."""
    promise = d.promises.get(name)
    ungranted = promise is not None and promise.granted is None and promise.done is None
    is_in = d.consumers[name].residency is RESIDENT
    return ungranted and is_in and name in d.waiting


def _failed(d: Draft, event: ProbeResult, state: ConsumerState) -> None:
    name = event.consumer
    d.update(name, last_probe=event.taken)
    if event.failure == "timeout" and _worked(d, name, event.taken):
        d.note("Ignored", consumer=name, what="ProbeResult", because="it was at work for us")
        return
    if state.operation is not None or event.taken < state.moved:
        d.note("Ignored", consumer=name, what="ProbeResult", because="it loaded or unloaded")
        return
    failures = state.probe_failures + 1
    d.update(name, probe_failures=failures, probe_error=event.error or event.failure)
    refused = event.failure == "refused"
    if not refused and failures < d.config.probe_failures:
        return
    d.update(name, healthy=False)
    if not state.unreachable:
        d.note("Unreachable", consumer=name, error=event.error or event.failure)
    if refused:
        d.update(name, refused=True, cleared=False, busy_seen=None)
        d.move(name, Cause.REFUSED, Source.PROBE)
        if name not in d.swaps:
            d.give_up_promise(name)
    if not d.consumer(name).startable:
        _fail_all(d, name)


def _worked(d: Draft, name: str, since: int) -> bool:
    """Its server worked for us since then, and may have answered nobody meanwhile."""
    return any(
        one in d.serving or d.consumers[one].last_done >= since for one in (name, *d.siblings(name))
    )


def _fail_all(d: Draft, name: str) -> None:
    """Who becomes unreachable and can't be started fails all that waits for it."""
    error = d.consumers[name].probe_error
    for request in d.waiting_for(name):
        d.reject(
            request,
            "consumer_unreachable",
            f"{name} does not answer its health probe ({error})",
            retry_after_us=d.config.probe_interval_us,
        )


# --------------------------------------------------------------------------------------- samples


def on_sample(d: Draft, sample: GpuSample) -> None:
    """Believe a good reading, and let go of the promises that it shows as taken."""
    if sample.error != d.sample_error:
        d.note("SampleFailed" if sample.error else "SampledAgain", error=sample.error)
        d.stir()
    d.sample_error = sample.error
    if sample.error is not None:
        return
    taken = min(sample.taken, d.at)
    for reading in sample.gpus:
        old = d.cards.get(reading.index)
        if old is not None and taken < old.taken:
            d.note("Ignored", what="GpuSample", because="older than the last one")
            continue
        d.put_card(
            reading.index,
            Card(
                total_mib=reading.total_mib,
                used_mib=reading.used_mib,
                free_mib=reading.free_mib,
                taken=taken,
                foreign_mib=_foreign_mib(d, reading.index, reading.used_mib, old),
            ),
        )
    for name, promise in sorted(d.promises.items()) if d.promises else ():
        seen = {gpu: need for gpu, need in promise.mib.items() if good_card(d, gpu)}
        if seen and all(_shown_as_taken(d, promise, gpu, need) for gpu, need in seen.items()):
            d.give_up_promise(name)
            _see_cold_start(d, name, promise)
            _measure(d, name, promise)


def _see_cold_start(d: Draft, name: str, promise: Promise) -> None:
    """Learn from the card that a first request loaded its service, however that request ends."""
    grown = [
        2 * (d.cards[gpu].used_mib - promise.used_before_mib[gpu]) >= need
        for gpu, need in promise.mib.items()
        if gpu in promise.used_before_mib
    ]
    if promise.granted is None or not grown or not all(grown):
        return
    state = d.consumers[name]
    if state.uncertain == "load":
        d.move(name, Cause.SEEN_RESIDENT, Source.NVML, idle_since=d.at)
    elif state.residency is RESIDENT:
        d.update(name, source=Source.NVML, starter=None)


def _measure(d: Draft, name: str, promise: Promise) -> None:
    """Take what the card shows more than before its load as its footprint, where that is asked."""
    consumer, state = d.consumer(name), d.consumers[name]
    if not consumer.vram_auto or len(promise.mib) != 1 or promise.began is None:
        return
    others_moved = any(
        other != name
        and not d.consumer(other).vram_mib.keys().isdisjoint(promise.mib)
        and (d.consumers[other].moved >= promise.began or other in d.swaps)
        for other in d.consumers
    )
    if others_moved:
        return
    for gpu, before in promise.used_before_mib.items():
        grown = d.cards[gpu].used_mib - before
        if state.residency is RESIDENT and grown > 0:
            d.update(name, measured_mib=grown)
            d.note("Measured", consumer=name, measured_mib=grown)


def _foreign_mib(d: Draft, gpu: int, used_mib: int, old: Card | None) -> int:
    """What nobody here holds. While something moves, nobody can tell: the last figure stays."""
    ours, moving = 0, bool(d.promises)
    for name, state in d.consumers.items():
        moving = moving or state.operation is not None
        if state.residency is not ABSENT:
            ours += held_mib(d.consumer(name), state, gpu)
    return max(0, used_mib - ours) if old is None or not moving else old.foreign_mib


def _shown_as_taken(d: Draft, promise: Promise, gpu: int, need: int) -> bool:
    card = d.cards.get(gpu)
    if card is None:
        return False
    if promise.done is not None and card.taken > promise.done:
        return True
    if promise.granted is None or card.taken <= promise.granted:
        return False
    before: Mapping[int, int] = promise.used_before_mib
    # Of unknown size: any growth may be half of it, until its first request is over.
    return need > 0 and gpu in before and card.used_mib >= before[gpu] + need
