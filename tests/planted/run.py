"""Plant each bug in turn and see who notices: `make planted`.

python -m tests.planted.run [--seeds 1,2,3] [--runs 400] [--jobs 2] [--examples] [NAME ...]

Where each was noticed is kept in `caught.json`, for the tests to look there first.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attrs import frozen

from tests.planted.planting import Caught, caught, fails_an_example, planted
from tests.planted.plants import PLANTS, Plant

KEPT = Path(__file__).parent / "caught.json"
# Of the simulated host, for a seed, before a plant counts as not noticed.
RUNS = 1000


@frozen
class Outcome:
    # None: the core as it is, of which nobody may find anything.
    plant: Plant | None
    # The example test that fails; a plant should pass them all. None: not asked, or none fails.
    example: str | None
    caught: tuple[Caught | None, ...]

    @property
    def good(self) -> bool:
        if self.plant is None:
            return not any(self.caught)
        return self.example is None and all(self.caught)


def try_plant(
    plant: Plant | None, seeds: Sequence[int], *, runs: int, examples: bool = False
) -> Outcome:
    """Search anew: what is known of earlier runs is not used."""
    with planted(plant) as tree:
        example = fails_an_example(tree) if examples else None
        return Outcome(plant, example, caught(tree, seeds, runs=runs))


def noticed() -> dict[str, dict[int, int]]:
    """Give for each plant and seed the run in which it was noticed the last time."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return {name: {int(seed): run for seed, run in runs.items()} for name, runs in kept.items()}


def keep(outcome: Outcome, seeds: Sequence[int]) -> None:
    if outcome.plant is None:
        return
    kept = noticed()
    found = {s: one.run for s, one in zip(seeds, outcome.caught, strict=True) if one and one.run}
    kept[outcome.plant.name] = kept.get(outcome.plant.name, {}) | found
    names = [plant.name for plant in PLANTS if plant.name in kept]
    KEPT.write_text(json.dumps({name: kept[name] for name in names}, indent=1) + "\n")


def row(outcome: Outcome) -> str:
    found = [one for one in outcome.caught if one]
    name = outcome.plant.name if outcome.plant else "(nothing)"
    breaks = outcome.plant.breaks if outcome.plant else ""
    times = f"{len(found)}/{len(outcome.caught)}"
    events = ", ".join(str(one.events) for one in found)
    by = found[0].by[:90] if found else ""
    lines = [f"{name:<46} {breaks:<6} {times:<4} {events:<22} {by}"]
    if outcome.example:
        lines.append(f"    not subtle: {outcome.example}")
    return "\n".join(lines)


def chosen(names: Iterable[str]) -> list[Plant]:
    known = {plant.name: plant for plant in PLANTS}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no such plant: {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in names] or list(PLANTS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted.run")
    parser.add_argument("names", nargs="*", metavar="NAME", help="plants to try; none: all")
    parser.add_argument("--seeds", default="1,2,3", help="for the random histories")
    parser.add_argument("--runs", type=int, default=RUNS, help="for a seed, at most")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--examples", action="store_true", help="see that no example test fails")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",") if seed]
    plants = chosen(arguments.names)

    print(f"{'planted':<46} {'breaks':<6} {'seen':<4} {'after events':<22} by")
    control = try_plant(None, seeds, runs=arguments.runs)
    print(row(control), flush=True)
    if not control.good:
        print("\nthe core itself breaks a property: mend that first, it hides what is planted")
        return 1
    outcomes = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(
            lambda plant: try_plant(plant, seeds, runs=arguments.runs, examples=arguments.examples),
            plants,
        ):
            print(row(outcome), flush=True)
            keep(outcome, seeds)
            outcomes.append(outcome)
    good = sum(outcome.good for outcome in outcomes)
    print(f"\n{good} of {len(outcomes)} planted bugs are caught with every seed")
    return 0 if good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
