"""What was recorded, asked afterwards: does the log decide the same again, and does a simulation
of it come near to what happened?
"""

import json
from pathlib import Path

from broker import Host, mgpu
from client import check

NEAR = 0.1  # of the recorded mean wait


def look_back(host: Host) -> None:
    log = host.variables["REAL_LOG_DIR"]
    print(f"mgpu replay {Path(log).name}:\n{_indented(_done(host, 'replay', log))}")
    words = ("whatif", log, "--config", str(host.config))
    print(f"mgpu {' '.join((words[0], Path(log).name, *words[2:3], host.config.name))}:")
    print(_indented(_done(host, *words)), flush=True)
    compared = json.loads(_done(host, *words, "--json"))
    recorded = compared["recorded"]
    for name in ("same", "new"):  # the new configuration is the old one
        simulated = compared[name]
        for what in ("loads", "evictions", "rejected"):
            check(
                simulated[what] == recorded[what],
                f"{name}: {what}: {simulated[what]} for {recorded[what]}",
            )
        off = abs(simulated["mean_wait_ms"] / recorded["mean_wait_ms"] - 1)
        check(off <= NEAR, f"{name}: the mean wait is {off:.0%} off")


def _done(host: Host, *words: str) -> str:
    """Give what a command says that ends well."""
    ended = mgpu(host, *words)
    told = f"{ended.stdout}{ended.stderr}".strip()
    check(ended.returncode == 0, f"mgpu {words[0]} ended with {ended.returncode}: {told}")
    return ended.stdout.strip() if "--json" in words else told


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
