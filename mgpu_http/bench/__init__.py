"""`mgpu bench`: what a step costs, what the broker adds to a request, how policies compare.

`core` steps the scheduler without a runtime; `log` writes an event log and replays it; `proxying`
sends requests through real processes: the service itself (`upstream`), a bare Hypercorn application
and a plain proxy that schedules nothing (`baselines`), and the broker. `load` is the client,
`servers` starts the processes. `world` tells how fast the simulated host is, and `schedule` lets
policies work off the same arrivals in it, drawn or read (`traces`).

Machines are noisy: compare within one run, where everything takes turns.
"""

# The parts of it, and what each table is headed by.
PARTS = {
    "steps": "A step of the scheduler: a request and its end, 8 consumers",
    "walk": "A pass over everybody that waits",
    "log": "The event log: what writing it costs the event loop, and how fast it is replayed",
    "world": "The simulated host: how many events it takes in a second",
    "requests": "A request and its answer",
    "streams": "An answer in 1,000 chunks",
    "bodies": "Memory while 1 GiB passes",
    "schedule": "Policies on the same arrivals, simulated: waits in seconds, means over the seeds",
}
