"""Bugs for the properties to find: small changes to the core, each wrong in its own way.

Every one of them passes the example tests of `tests/core`. `text` stands exactly once in its
module, so that a plant that no longer applies is noticed and mended, not forgotten.
"""

from attrs import field, frozen


@frozen
class Edit:
    module: str
    text: str
    instead: str


@frozen
class Plant:
    """`breaks` is the property that fails, `like` the defect of a peer that is of this kind."""

    name: str
    breaks: str
    edits: tuple[Edit, ...]
    like: str = field(kw_only=True, default="")


def plant(
    name: str, breaks: str, module: str, text: str, instead: str, *more: Edit, like: str = ""
) -> Plant:
    return Plant(name, breaks, (Edit(module, text, instead), *more), like=like)


PLANTS = (
    # ------------------------------------------------------------ waits that never end
    plant(
        "lost-wake-up-of-a-sibling",
        "P1",
        "requests",
        "any(one in d.waiting for one in (name, *d.siblings(name)))",
        "name in d.waiting",
        like="large-model-proxy: signal dropped, waiter hung",
    ),
    plant(
        "owed-and-promoted-wait-for-each-other",
        "P1",
        "walk",
        "if reason is None or (request.owed and reason.why is Why.PROMOTED_AHEAD):",
        "if reason is None:",
        like="llama.cpp #28443: two wait for each other's room",
    ),
    plant(
        "a-timed-out-job-never-ends",
        "P10",
        "requests",
        "if request is None or request.phase is not SERVING:",
        'if request is None or request.phase is not SERVING or event.outcome == "timeout":',
        like="ServerlessLLM: a count that is never given back",
    ),
    plant(
        "leak-on-cancel-before-a-cold-start",
        "P9",
        "swaps",
        "    d.give_up_promise(swap.target)\n"
        "    for name in waiters:\n"
        "        d.enqueue_again(name, owed=False)",
        "    if waiters or not d.consumer(swap.target).lazy:\n"
        "        d.give_up_promise(swap.target)\n"
        "    for name in waiters:\n"
        "        d.enqueue_again(name, owed=False)",
        like="ollama #10599: leak on cancel while loading",
    ),
    plant(
        "deadline-beyond-the-longest-wait",
        "P1",
        "requests",
        "deadline if event.deadline is None else min(deadline, event.deadline)",
        "deadline if event.deadline is None else event.deadline",
    ),
    plant(
        "queued-waiters-survive-a-failed-load",
        "P14",
        "completions",
        "        for request in d.waiting_for(name):\n            d.reject(\n",
        "        for request in d.joined(name):\n            d.reject(\n",
        like="LocalAI #10719: no cool-down after a failed load",
    ),
    # ------------------------------------------------------------ overtaking
    plant(
        "the-busy-victim-gets-more-work",
        "P2",
        "walk",
        "return may_be_evicted(d, consumer.name) and consumer.name not in promoted",
        "idle = d.serving.get(consumer.name, 0) < 2 and may_be_evicted(d, consumer.name)\n"
        "    return idle and consumer.name not in promoted",
        like="ollama #14407: a victim under overlapping traffic is never idle",
    ),
    plant(
        "no-fence-while-memory-comes-free",
        "P8",
        "walk",
        "BEYOND_HELP = frozenset({Why.UNFIT,",
        "BEYOND_HELP = frozenset({Why.MEMORY, Why.UNFIT,",
        like="large-model-proxy L1: a large request starves behind small ones",
    ),
    plant(
        "no-fence-while-its-swap-collides",
        "P8",
        "walk",
        "BEYOND_HELP = frozenset({Why.UNFIT,",
        "BEYOND_HELP = frozenset({Why.COLLISION, Why.UNFIT,",
        like="llama-swap D3: unbounded overtaking",
    ),
    plant(
        "counts-begin-anew-after-a-swap",
        "P8",
        "draft",
        '        self._own("overtaken").setdefault(name, 0)\n',
        '        self._own("overtaken")[name] = 0\n',
        like="llama-swap D3: unbounded overtaking",
    ),
    plant(
        "owed-to-the-highest-priority-only",
        "P15",
        "swaps",
        "d.enqueue_again(name, owed=True)",
        "most = max(d.requests[one].priority for one in waiters if one in d.requests)\n"
        "            d.enqueue_again(name, owed=d.requests[name].priority == most)",
        like="llama.cpp #22284: two loads evict each other",
    ),
    # ------------------------------------------------------------ who may not be evicted
    plant(
        "leaky-stop-takes-a-working-sibling",
        "P4",
        "memory",
        "return () if d.goes_by_route(name) else d.siblings(name)",
        "return () if d.consumer(name).unload_route else d.siblings(name)",
        like="llama.cpp #21678: evicts an active model",
    ),
    plant(
        "who-unloads-already-counts-as-gone",
        "P4",
        "memory",
        "        or d.consumers[name].operation is not None\n        or is_busy(d, name)",
        "        or (d.consumers[name].operation is not None and name not in d.waiting)\n"
        "        or is_busy(d, name)",
        like="llama.cpp #25528: takes a model in the middle of its load",
    ),
    plant(
        "idleness-takes-a-pinned-sibling",
        "P4",
        "operator",
        "        if may_be_evicted(d, name):\n",
        "        if not d.consumers[name].unload_cooldown:\n",
        like="llama.cpp #21678: evicts what may not go",
    ),
    plant(
        "unload-does-not-wait-for-strangers-work",
        "P4",
        "operator",
        "elif name not in d.serving and not is_busy(d, name) and not _siblings_at_work(d, name):",
        "elif name not in d.serving and not _siblings_at_work(d, name):",
        like="llama.cpp #21678: evicts an active model",
    ),
    plant(
        "force-takes-a-working-sibling",
        "P4",
        "operator",
        "    if any(at_work(d, one) for one in stops_with(d, name)):\n        # Others",
        "    if any(one in d.swaps for one in stops_with(d, name)):\n        # Others",
        like="llama.cpp #21678: evicts an active model",
    ),
    plant(
        "a-friends-server-is-stopped",
        "P4",
        "planners",
        "            and (not holder.stops_with or spared.isdisjoint(holder.stops_with))\n",
        "",
    ),
    plant(
        "alike-whoever-the-friends-are",
        "P4",
        "config",
        "return (needs, tuple(self.vram_mib), self.can_coexist_with)",
        "return (needs, tuple(self.vram_mib))",
    ),
    # ------------------------------------------------------------ plans
    plant(
        "measured-once-counted-on-each-card",
        "P3",
        "memory",
        "if state.measured_mib is not None and len(consumer.vram_mib) == 1:",
        "if state.measured_mib is not None:",
        like="large-model-proxy L2: evicts without knowing that it suffices",
    ),
    plant(
        "the-cushion-of-another-card",
        "P3",
        "memory",
        "return {gpu: need + cushion_mib(d, gpu) for gpu, need in needs.items()}",
        "return {gpu: need + cushion_mib(d, min(needs)) for gpu, need in needs.items()}",
        like="surogate #140: eviction commits before it knows it suffices",
    ),
    plant(
        "an-unload-under-way-is-free-memory-already",
        "P7",
        "memory",
        "    if state.residency is ABSENT:\n        return 0\n    return held_mib(",
        "    if state.residency in {ABSENT, UNLOADING}:\n        return 0\n    return held_mib(",
        like="large-model-proxy L2: evicts without knowing that it suffices",
    ),
    plant(
        "a-set-that-helps-one-card-of-two",
        "P3",
        "planners",
        "return None if left else ",
        "return None if len(left) == len(missing) else ",
        like="surogate #140: eviction commits before it knows it suffices",
    ),
    # ------------------------------------------------------------ memory sold twice
    plant(
        "any-victim-out-is-all-victims-out",
        "P7",
        "swaps",
        "for name in swap.evicted\n        if (operation",
        "for name in swap.evicted[-1:]\n        if (operation",
        like="ollama E3: tokens of unloads are anonymous",
    ),
    plant(
        "one-unload-of-a-server-ends-the-other",
        "P6",
        "completions",
        '        and (one == name or operation.how == "driver")\n',
        "",
        like="ollama E3: tokens of unloads are anonymous",
    ),
    plant(
        "a-late-completion-ends-a-later-load",
        "P6",
        "completions",
        'if operation is None or operation.kind != "load" or operation.epoch != event.epoch:',
        "swap = d.swaps.get(event.consumer)\n"
        "    old = operation is not None and operation.epoch != event.epoch\n"
        '    if operation is None or operation.kind != "load" or (old and not swap.evicted):',
        like="llama-swap D1: stale SwapDone",
    ),
    plant(
        "a-late-stop-ends-a-later-stop",
        "P6",
        "completions",
        'if operation is None or operation.kind != "unload" or operation.epoch != event.epoch:',
        'old = operation is not None and operation.how == "routes"\n'
        "    old = old and operation.epoch != event.epoch\n"
        '    if operation is None or operation.kind != "unload" or old:',
        like="ollama E3: tokens of unloads are anonymous",
    ),
    plant(
        "a-difference-that-wraps",
        "P7",
        "swaps",
        "    if seen and fits_now(d, swap.target):\n        trust_again(d, swap)\n",
        "    freed = [\n"
        "        (card.free_mib - before) % 2**32 > 2**31\n"
        "        for gpu, before in swap.free_before_mib.items()\n"
        "        if (card := good_card(d, gpu))\n"
        "    ]\n"
        "    if seen and (fits_now(d, swap.target) or any(freed)):\n"
        "        trust_again(d, swap)\n",
        like="ollama E4: unsigned difference of free memory",
    ),
    plant(
        "what-another-load-takes-is-its-own",
        "P7",
        "memory",
        "used = {gpu: mib for gpu, mib in _used_mib(d, promise).items() if gpu not in others}",
        "used = _used_mib(d, promise)",
        like="large-model-proxy L5: reservation of a lazy loader freed too early",
    ),
    plant(
        "what-strangers-hold-is-its-own",
        "P7",
        "memory",
        "return max(0, min(own, card.used_mib - others))",
        "return max(0, card.used_mib - others)",
        like="ollama E4: another process takes memory meanwhile",
    ),
    plant(
        "half-a-cold-start-is-a-whole-one",
        "P7",
        "beliefs",
        "return need > 0 and gpu in before and card.used_mib >= before[gpu] + need",
        "return need > 0 and gpu in before and 2 * card.used_mib >= 2 * before[gpu] + need",
        like="large-model-proxy L5: reservation of a lazy loader freed too early",
    ),
    plant(
        "any-failed-job-is-the-cold-start",
        "P7",
        "requests",
        "if state.starter == event.request:",
        "if state.starter is not None:",
        like="large-model-proxy L5: reservation of a lazy loader freed too early",
    ),
    plant(
        "promised-without-the-peak-of-its-load",
        "P7",
        "memory",
        "d.put_promise(target, Promise(mib=needs))",
        "steady = {gpu: held_mib(consumer, state, gpu) or mib for gpu, mib in needs.items()}\n"
        "        d.put_promise(target, Promise(mib=steady))",
        like="large-model-proxy L5: reservation smaller than what is taken",
    ),
    plant(
        "alike-whatever-their-load-takes",
        "P7",
        "config",
        "needs = () if self.vram_managed else (*self.vram_mib.items(), self.vram_load_mib)",
        "needs = () if self.vram_managed else (*self.vram_mib.items(),)",
    ),
    plant(
        "two-loads-at-once-where-none-may-overlap",
        "P10",
        "walk",
        "in_the_way = at_work | _swaps_beside(d, consumer)",
        "in_the_way = at_work or set()",
    ),
    # ------------------------------------------------------------ one load at a time
    plant(
        "a-load-that-dies-with-its-second-waiter",
        "P5",
        "draft",
        'kind="load", epoch=epoch, since=self.at, deadline=self.at + self.config.load_timeout_us\n',
        'kind="load",\n'
        "            epoch=epoch,\n"
        "            since=self.at,\n"
        "            deadline=min(\n"
        "                [self.at + self.config.load_timeout_us]\n"
        "                + [self.requests[one].deadline for one in self.joined(name)[1:]]\n"
        "            ),\n",
        like="large-model-proxy L4: the load belongs to one client",
    ),
    plant(
        "loaded-into-a-server-that-is-being-stopped",
        "P5",
        "walk",
        "if state.operation is not None or _server_stops(d, consumer):",
        "if state.operation is not None:",
        like="speaches: out of the books while at work, loaded a second time",
    ),
    plant(
        "a-probe-takes-it-away-from-its-work",
        "P5",
        "beliefs",
        "        and name not in d.serving\n        and name not in d.swaps\n",
        "        and state.starter is None\n        and name not in d.swaps\n",
        like="speaches: out of the books while at work, loaded a second time",
    ),
    plant(
        "an-early-probe-brings-a-victim-back",
        "P2",
        "swaps",
        "    for name in (swap.target, *swap.victims):\n        if name in d.consumers:\n",
        "    for name in (swap.target,):\n        if name in d.consumers:\n",
        like="ollama #17408: a victim is resurrected, who waits for it waits for ever",
    ),
    plant(
        "a-probe-forgives-who-has-to-leave",
        "P2",
        "beliefs",
        "        return  # that is no news\n",
        "        d.update(name, leaving=False)\n        return\n",
        like="ollama #17408: a victim is resurrected, who waits for it waits for ever",
    ),
    # ------------------------------------------------------------ limits
    plant(
        "a-servers-limit-that-was-lowered",
        "P10",
        "walk",
        "if serving + sum(others.values()) >= consumer.server_concurrency:",
        "if serving + sum(others.values()) == consumer.server_concurrency:",
    ),
    plant(
        "a-cards-limit-that-was-lowered",
        "P10",
        "walk",
        "if len(holders) >= settings.max_parallel:",
        "if len(holders) == settings.max_parallel:",
    ),
    plant(
        "gone-from-the-configuration-in-mid-work",
        "P1",
        "lifecycle",
        "        or name in d.waiting\n        or name in d.serving\n",
        "        or name in d.waiting\n",
    ),
    # ------------------------------------------------------------ purity, replay, restart
    plant(
        "an-old-state-that-changes",
        "P11",
        "draft",
        '    "reasons",\n    "waiting",\n',
        '    "waiting",\n',
    ),
    plant(
        "decisions-by-the-order-of-the-file",
        "P13",
        "lifecycle",
        "d.configure(in_order(evolve(new, consumers=consumers)))",
        "d.configure(evolve(new, consumers=consumers))",
        like="large-model-proxy: the first missing resource, in random order",
    ),
    plant(
        "a-reading-that-outlives-a-crash",
        "P12",
        "draft",
        '    "promises",\n    "cards",\n',
        '    "promises",\n',
    ),
    plant(
        "owed-to-nobody-after-a-crash",
        "P12",
        "draft",
        '    "owed",\n    "swaps",\n',
        '    "swaps",\n',
    ),
)
