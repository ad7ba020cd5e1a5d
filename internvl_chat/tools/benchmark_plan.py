"""Measures planners on a published mixture of instruction data: how full rows are, how long ranks wait, how long
planning takes. `python tools/benchmark_plan.py` prints one table and draws one picture.

The mixture is the joint histogram of tiles and tokens of four public sets (OmniBal, arXiv 2407.20761), alone and half
and half with text. `ours` is `internvl/planning/epoch_plan.py`. Beside it: upstream's packing (first fit into a
buffer of 20 rows), the best fit by tokens alone in falling order, cut where it breaks the limit of tiles, and padding
samples that come in random order. Those deal their rows to ranks as they come.
"""

import argparse
import json
import resource
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tools.benchmark.sizes import SIZES, config_of

from internvl.command_line import command
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleLengths, plan_epoch
from internvl.planning.plan_report import load_imbalance, packing_efficiency
from internvl.planning.sample_cost import Passes, step_cost

ROOM = {"max_tokens": 8192, "max_tiles": 40}
BUFFER = 20
PADDED = 4  # samples of a padded batch
SLOW = 200_000  # samples beyond which the planners that go sample by sample are left out
# InternVL2.5-1B: InternViT-300M and Qwen2.5-0.5B, LoRA in both, activations computed again.
COST = step_cost(config_of(SIZES["1b"]), Passes(3, 3))
HISTOGRAM = Path(__file__).resolve().parents[2] / "tests/data/length_histogram.json"


def mixture(cells: np.ndarray, samples: int, with_text: bool, seed: int = 0) -> SampleLengths:
    """Lengths drawn from the histogram's (C, 3) cells of tiles, tokens (the middle of 8) and samples."""
    rng = np.random.default_rng(seed)
    text = samples // 2 if with_text else 0
    drawn = cells[rng.choice(len(cells), samples - text, p=cells[:, 2] / cells[:, 2].sum())]
    tokens = np.concatenate(
        [drawn[:, 1] + rng.integers(-4, 4, len(drawn)), np.clip(rng.lognormal(6.2, 0.9, text), 32, 8192)]
    ).astype(np.int32)
    tiles = np.concatenate([drawn[:, 0], np.zeros(text)]).astype(np.int32)
    order = rng.permutation(samples)
    answers = np.maximum(1, (tokens - 256 * tiles) // 4).astype(np.int32)
    return SampleLengths(tokens[order], answers[order], tiles[order])


# -- planners ----------------------------------------------------------------------------------------------------------


def ours(lengths: SampleLengths, world: int) -> EpochPlan:
    return plan_epoch(lengths, PlanLayout(0, world, 1, 1, packed=True, **ROOM, cost=COST), 0)


def first_fit(lengths: SampleLengths, world: int) -> EpochPlan:
    """The first open row that has room, most tiles first; the one of most tiles is closed when over 20 are open."""
    open_rows, closed = [], []
    for sample, (tokens, tiles) in enumerate(zip(lengths.tokens.tolist(), lengths.tiles.tolist(), strict=True)):
        for place, (held_tiles, held_tokens, row) in enumerate(open_rows):  # noqa: B007 (used below)
            if held_tiles + tiles <= ROOM["max_tiles"] and held_tokens + tokens <= ROOM["max_tokens"]:
                del open_rows[place]
                break
        else:
            held_tiles, held_tokens, row = 0, 0, []
        row.append(sample)
        insort(open_rows, (held_tiles + tiles, held_tokens + tokens, row), key=lambda entry: -entry[0])
        if len(open_rows) > BUFFER:
            closed.append(open_rows.pop(0)[2])
    return dealt([*closed, *(row for _, _, row in open_rows)], world)


def best_fit(lengths: SampleLengths, world: int) -> EpochPlan:
    """The fullest row that has room by tokens, longest samples first; rows of too many tiles are cut."""
    rooms: list[tuple[int, int]] = []  # room and number of each row, ascending
    rows: list[list[int]] = []
    tokens = lengths.tokens.tolist()
    for sample in np.argsort(-lengths.tokens, kind="stable").tolist():
        place = bisect_left(rooms, (tokens[sample], -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = ROOM["max_tokens"], len(rows)
            rows.append([])
        rows[row].append(sample)
        insort(rooms, (room - tokens[sample], row))
    cut = []
    for row in rows:
        parts = np.cumsum(lengths.tiles[row]) // (ROOM["max_tiles"] + 1)
        cut += [np.array(row)[parts == part].tolist() for part in np.unique(parts)]
    return dealt(cut, world)


def padded(lengths: SampleLengths, world: int) -> EpochPlan:
    return plan_epoch(lengths, PlanLayout(0, world, PADDED, 1), 0)


def dealt(rows: list[list[int]], world: int) -> EpochPlan:
    """Rows in random order, dealt to the ranks."""
    steps = -(-len(rows) // world)
    slots = np.full(steps * world, -1)
    slots[: len(rows)] = np.random.default_rng(0).permutation(len(rows))
    starts = np.cumsum([0, *map(len, rows)])
    return EpochPlan(np.concatenate(rows), starts, slots.reshape(steps, 1, world, 1))


# -- the table ---------------------------------------------------------------------------------------------------------

PLANNERS: dict[str, Callable[[SampleLengths, int], EpochPlan]] = {
    "ours": ours,
    "first fit, buffer of 20": first_fit,
    "best fit by tokens": best_fit,
    f"padded batches of {PADDED}": padded,
}


def measure(name: str, lengths: SampleLengths) -> dict[str, float]:
    """Fill, idle time at 8 and 64 ranks without the last, incomplete step, and seconds for a plan."""
    start = time.perf_counter()
    plans = {8: PLANNERS[name](lengths, 8)}
    seconds = time.perf_counter() - start
    plans[64] = PLANNERS[name](lengths, 64)
    layout = PlanLayout(0, 8, 1, 1, packed=not name.startswith("padded"), **ROOM)
    waiting = {
        f"idle at {world}": load_imbalance(EpochPlan(plan.samples, plan.starts, plan.steps[:-1]), COST.of(lengths))
        for world, plan in plans.items()
    }
    return {"fill": packing_efficiency(plans[8], lengths, layout), **waiting, "seconds": seconds}


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--output", default="benchmark_plan", help="stem of the picture and of the JSON file")
    args = parser.parse_args(argv)
    sets = json.loads(HISTOGRAM.read_text())["sets"]
    cells = np.array([cell for cells in sets.values() for cell in cells])
    results = []
    print(f"{'mixture':12}{'samples':>12}  {'planner':26}{'fill':>8}{'idle at 8':>11}{'idle at 64':>11}{'seconds':>9}")
    for samples in args.samples:
        for mixed in (False, True):
            lengths = mixture(cells, samples, mixed)
            for name in PLANNERS if samples <= SLOW else ["ours"]:
                found = measure(name, lengths)
                results.append(
                    {"mixture": "with text" if mixed else "images", "samples": samples, "planner": name} | found
                )
                print(
                    f"{results[-1]['mixture']:12}{samples:12,}  {name:26}{found['fill']:8.2%}{found['idle at 8']:11.2%}"
                    f"{found['idle at 64']:11.2%}{found['seconds']:9.2f}",
                    flush=True,
                )
    print(f"most memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    Path(f"{args.output}.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, f"{args.output}.png")


def draw(results: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if r["samples"] == min(result["samples"] for result in results)]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.5), layout="constrained", sharey=True)
    for axis, key in zip(axes, ("fill", "idle at 8", "idle at 64"), strict=True):
        labels = [f"{r['planner']}, {r['mixture']}" for r in shown]
        axis.barh(
            labels, [100 * r[key] for r in shown], color=["C1" if r["planner"] == "ours" else "C0" for r in shown]
        )
        axis.set(title=f"{key} (%)")
        axis.invert_yaxis() if key == "fill" else None
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
