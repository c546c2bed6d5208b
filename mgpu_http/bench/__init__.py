"""`mgpu bench`: what a scheduling step costs, and what the broker adds to a request.

`core` steps the scheduler without a runtime; `proxying` sends requests through real processes:
the service itself (`upstream`), a bare Hypercorn application and a plain proxy that schedules
nothing (`baselines`), and the broker. `load` is the client, `servers` starts the processes.

Machines are noisy: compare within one run, where everything takes turns.
"""
