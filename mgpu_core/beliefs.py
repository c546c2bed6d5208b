"""Events that tell what is really so: samples of the cards, and probes of the services."""

from mgpu_core.draft import Draft
from mgpu_core.events import GpuSample, ProbeResult
from mgpu_core.memory import take_sample
from mgpu_core.requests import is_unreachable
from mgpu_core.state import ConsumerState, Residency, Source, assumed_residency
from mgpu_core.transitions import Cause


def on_sample(d: Draft, event: GpuSample) -> None:
    take_sample(d, event)


def on_probe(d: Draft, event: ProbeResult) -> None:
    state = d.consumers.get(event.consumer)
    if state is None:
        d.note("Ignored", consumer=event.consumer, what="ProbeResult", because="it is not known")
        return
    if state.last_probe is not None and event.taken < state.last_probe:
        d.note(
            "Ignored", consumer=event.consumer, what="ProbeResult", because="older than the last"
        )
        return
    d.update(event.consumer, last_probe=event.taken, probe_error=event.error or event.failure)
    if event.healthy:
        _answered(d, event, state)
    else:
        _failed(d, event, state)


def _answered(d: Draft, event: ProbeResult, state: ConsumerState) -> None:
    """It lives; believe what it says of itself where nothing moved since it was asked."""
    name = event.consumer
    if state.healthy is False:
        d.note("Healthy", consumer=name)
        d.again = True
    d.update(name, healthy=True, refused=False, probe_failures=0, probe_error=None)
    quiet = (
        state.operation is None
        and name not in d.swaps
        and name not in d.serving
        and event.taken > state.touched
    )
    if quiet and event.resident is not None:
        _see(d, name, resident=event.resident, source=Source.PROBE)
    elif quiet and state.refused:
        assumed = assumed_residency(d.consumer(name)) is Residency.RESIDENT
        _see(d, name, resident=assumed, source=Source.ASSUMED)
    if event.vram_mib and d.consumers[name].residency is Residency.RESIDENT:
        d.update(name, measured_mib=event.vram_mib)
    if event.busy is not None:
        d.update(name, busy_seen=event.taken if event.busy else None)
        d.again = True


def _see(d: Draft, name: str, *, resident: bool, source: Source) -> None:
    """Take a probe's word for whether it is loaded."""
    state = d.consumers[name]
    if resident:
        if state.cleared:
            return  # it is about to be cold-started: the promise holds until it is
        fresh = state.residency is not Residency.RESIDENT
        idle_since = d.at if fresh else state.idle_since
        d.move(name, Cause.SEEN_RESIDENT, source, idle_since=idle_since)
    elif state.cleared:
        return
    else:
        d.move(name, Cause.SEEN_ABSENT, source)
        d.give_up_promise(name)


def _failed(d: Draft, event: ProbeResult, state: ConsumerState) -> None:
    name = event.consumer
    if event.failure == "timeout" and (name in d.serving or event.taken <= state.last_done):
        d.note("Ignored", consumer=name, what="ProbeResult", because="it was at work for us")
        return
    if state.operation is not None or event.taken < state.moved:
        d.note("Ignored", consumer=name, what="ProbeResult", because="it loaded or unloaded")
        return
    failures = state.probe_failures + 1
    d.update(name, probe_failures=failures)
    refused = event.failure == "refused"
    if not refused and failures < d.config.probe_failures:
        return
    d.update(name, healthy=False)
    if not is_unreachable(state):
        d.note("Unreachable", consumer=name, error=event.error or event.failure)
        d.again = True
    if refused:
        d.update(name, refused=True, cleared=False, busy_seen=None)
        d.move(name, Cause.REFUSED, Source.PROBE)
        d.give_up_promise(name)
    if not d.consumer(name).startable:
        _fail_all(d, name)


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
