"""`mgpu demo`: the broker in front of stand-in services, with clients that load it.

Nothing of it is needed to run the broker. Every service is a process of its own that speaks HTTP
and holds memory on one simulated card, so that the broker is exercised as it is in earnest.

`card`       the card's memory: a process that owns it, and the connection that services hold it by
`service`    runs one of the services
`services/`  the services, each with the shape and the vices of the real one, and what they share
`traffic`    what is asked, and when
`clients`    who asks, and what came of it
`host`       starts and ends the processes
`screen`     what is shown while it runs
`report`     what is said at the end
`run`        all of that together
"""
