"""Compare planners on a published mixture of instruction data.

`python tools/benchmark_plan.py` measures packing efficiency, load imbalance and planning time (two CPU cores, three
minutes). It prints a table and draws a figure. The mixture is drawn several times. Figures are medians over the draws,
with their 95 % interval.

The mixture is the joint histogram of tiles and tokens of four public datasets (OmniBal, arXiv 2407.20761), without text
samples and with as many of them. Planners: `ours` is `internvl/planning/epoch_plan.py`; upstream's packing (first fit
into a buffer of 20 rows); best fit decreasing by tokens, its rows cut where they exceed the limit of tiles; and padded
batches in random order. All but `ours` distribute their rows over ranks in random order.
"""

import argparse
import json
import resource
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from internvl.command_line import exit_on_user_error
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleCost, make_sample_lengths, plan_epoch
from internvl.planning.plan_report import compute_load_imbalance, compute_packing_efficiency
from internvl.planning.sample_cost import count_forward_flops, scale_to_training
from internvl.tools.benchmark.sizes import MODEL_SIZES, ROW_TILES, ROW_TOKENS, TILE_TOKENS, build_config
from internvl.tools.benchmark.turns import MIN_TURNS, compute_median_interval, format_interval

ROW_LIMITS = {"max_tokens": ROW_TOKENS, "max_tiles": ROW_TILES}
BUFFER_ROWS = 20  # open rows of upstream's packing
PADDED_BATCH_SIZE = 4
MAX_SAMPLES_OF_SLOW_PLANNERS = 200_000  # planners with a Python loop over samples are skipped above this
HISTOGRAM_PATH = Path(__file__).resolve().parents[2] / "tests/data/length_histogram.json"


@lru_cache
def get_sample_cost() -> SampleCost:
    """Return the cost for InternVL2.5-1B with LoRA and gradient checkpointing."""
    return scale_to_training(count_forward_flops(build_config(MODEL_SIZES["1b"])), vision_passes=3, llm_passes=3)


def draw_mixture(num_samples: int, with_text: bool, seed: int = 0) -> np.ndarray:
    """Draw (num_samples,) lengths from the histogram.

    Args:
        with_text: whether half of the samples have text only.
    """
    datasets = json.loads(HISTOGRAM_PATH.read_text())["sets"].values()
    cells = np.array([cell for dataset in datasets for cell in dataset])  # (C, 3): tiles, tokens in steps of 8, samples
    rng = np.random.default_rng(seed)
    num_text = num_samples // 2 if with_text else 0
    drawn = cells[rng.choice(len(cells), num_samples - num_text, p=cells[:, 2] / cells[:, 2].sum())]
    image_tokens = drawn[:, 1] + rng.integers(-4, 4, len(drawn))
    text_tokens = np.clip(rng.lognormal(6.2, 0.9, num_text), 32, 8192)
    tokens = np.concatenate([image_tokens, text_tokens]).astype(np.int32)
    tiles = np.concatenate([drawn[:, 0], np.zeros(num_text)]).astype(np.int32)
    order = rng.permutation(num_samples)
    loss_tokens = np.maximum(1, (tokens - TILE_TOKENS * tiles) // 4)  # a quarter of the text
    return make_sample_lengths(tokens[order], loss_tokens[order], tiles[order])


# -- planners ----------------------------------------------------------------------------------------------------------


def plan_ours(lengths: np.ndarray, world_size: int) -> EpochPlan:
    """Plan as training does."""
    layout = PlanLayout(0, world_size, 1, 1, packed=True, **ROW_LIMITS, sample_cost=get_sample_cost())
    return plan_epoch(lengths, layout, 0)


def plan_first_fit(lengths: np.ndarray, world_size: int) -> EpochPlan:
    """Plan as upstream does.

    A sample goes into the first open row with room for it, rows of most tiles first. If more than 20 rows are open, the
    one of most tiles is closed.
    """
    open_rows, closed = [], []
    for sample, (tokens, _, tiles) in enumerate(lengths.tolist()):
        for place, (row_tiles, row_tokens, row) in enumerate(open_rows):  # noqa: B007 (used after the loop)
            if row_tiles + tiles <= ROW_LIMITS["max_tiles"] and row_tokens + tokens <= ROW_LIMITS["max_tokens"]:
                del open_rows[place]
                break
        else:
            row_tiles, row_tokens, row = 0, 0, []
        row.append(sample)
        insort(open_rows, (row_tiles + tiles, row_tokens + tokens, row), key=lambda entry: -entry[0])
        if len(open_rows) > BUFFER_ROWS:
            closed.append(open_rows.pop(0)[2])
    return distribute_rows([*closed, *(row for _, _, row in open_rows)], world_size)


def plan_best_fit(lengths: np.ndarray, world_size: int) -> EpochPlan:
    """Plan with best fit decreasing by tokens.

    The longest sample goes into the fullest row with room for its tokens. Rows of too many tiles are cut.
    """
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    rows: list[list[int]] = []
    tokens = lengths["tokens"].tolist()
    for sample in map(int, np.argsort(-lengths["tokens"], kind="stable")):
        place = bisect_left(rooms, (tokens[sample], -1))  # the fullest row with enough room
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = ROW_LIMITS["max_tokens"], len(rows)
            rows.append([])
        rows[row].append(sample)
        insort(rooms, (room - tokens[sample], row))
    cut_rows = []
    for row in rows:
        pieces = np.cumsum(lengths["tiles"][row]) // (ROW_LIMITS["max_tiles"] + 1)
        cut_rows += [np.array(row)[pieces == piece].tolist() for piece in np.unique(pieces)]
    return distribute_rows(cut_rows, world_size)


def plan_padded(lengths: np.ndarray, world_size: int) -> EpochPlan:
    """Plan padded batches in random order."""
    return plan_epoch(lengths, PlanLayout(0, world_size, PADDED_BATCH_SIZE, 1), 0)


def distribute_rows(rows: list[list[int]], world_size: int) -> EpochPlan:
    """Distribute rows over steps and ranks in random order."""
    num_steps = -(-len(rows) // world_size)
    slots = np.full(num_steps * world_size, -1)
    slots[: len(rows)] = np.random.default_rng(0).permutation(len(rows))
    row_starts = np.cumsum([0, *map(len, rows)])
    return EpochPlan(np.concatenate(rows), row_starts, slots.reshape(num_steps, 1, world_size, 1))


PLANNERS: dict[str, Callable[[np.ndarray, int], EpochPlan]] = {
    "ours": plan_ours,
    f"first fit, {BUFFER_ROWS} rows": plan_first_fit,
    "best fit by tokens": plan_best_fit,
    f"padded batches of {PADDED_BATCH_SIZE}": plan_padded,
}

# -- the table ---------------------------------------------------------------------------------------------------------

METRICS = {  # key in the JSON file -> column
    "packing_efficiency": "packing efficiency",
    "load_imbalance_8": "imbalance, 8 ranks",
    "load_imbalance_64": "imbalance, 64 ranks",
}


def measure_planner(name: str, lengths: np.ndarray) -> dict[str, float]:
    """Measure the metrics of a planner, and seconds per plan.

    The incomplete last step does not count.
    """
    start = time.perf_counter()
    plans = {8: PLANNERS[name](lengths, 8)}
    seconds = time.perf_counter() - start
    plans[64] = PLANNERS[name](lengths, 64)
    layout = PlanLayout(0, 8, 1, 1, packed=not name.startswith("padded"), **ROW_LIMITS)
    cost = get_sample_cost().compute(lengths)
    result = {"packing_efficiency": compute_packing_efficiency(plans[8], lengths, layout)}
    for world_size, plan in plans.items():
        complete_steps = EpochPlan(plan.samples, plan.row_starts, plan.steps[:-1])
        result[f"load_imbalance_{world_size}"] = compute_load_imbalance(complete_steps, cost)
    return result | {"seconds": seconds}


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--draws", type=int, default=MIN_TURNS, help="of the mixture (default: %(default)s)")
    parser.add_argument("--output", default="benchmark_plan", help="path of the figure and the JSON file, no suffix")
    args = parser.parse_args(argv)
    from internvl.versions import require_package  # here: `benchmark_step.py --against` runs older checkouts, too

    require_package("matplotlib", "the figure")
    get_sample_cost()  # cached: not part of the first plan's time
    results = []
    headings = "".join(f"{column:>28}" for column in METRICS.values())
    print(f"{'mixture':12}{'samples':>12}  {'planner':22}{headings}{'seconds':>20}")
    for num_samples in args.samples:
        for mixture, with_text in (("images", False), ("with text", True)):
            draws = [draw_mixture(num_samples, with_text, seed) for seed in range(args.draws)]
            for name in PLANNERS if num_samples <= MAX_SAMPLES_OF_SLOW_PLANNERS else ["ours"]:
                measured = [measure_planner(name, lengths) for lengths in draws]
                result = {key: compute_median_interval([draw[key] for draw in measured]) for key in measured[0]}
                results.append({"mixture": mixture, "samples": num_samples, "planner": name} | result)
                values = "".join(f"{format_interval(result[key], '.2%'):>28}" for key in METRICS)
                seconds = format_interval(result["seconds"])
                print(f"{mixture:12}{num_samples:12,}  {name:22}{values}{seconds:>20}", flush=True)
    print(f"Peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    Path(f"{args.output}.json").write_text(json.dumps(results, indent=2) + "\n")
    draw_results(results, f"{args.output}.png")


def draw_results(results: list[dict], path: str) -> None:
    """Draw the metrics of the smallest number of samples as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    min_samples = min(result["samples"] for result in results)
    shown = [result for result in results if result["samples"] == min_samples]
    labels = [f"{result['planner']}, {result['mixture']}" for result in shown]
    colors = ["C1" if result["planner"] == "ours" else "C0" for result in shown]
    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(13, 3.5), layout="constrained", sharey=True)
    for axis, (key, title) in zip(axes, METRICS.items(), strict=True):
        axis.barh(labels, [100 * result[key].median for result in shown], color=colors)
        axis.set(title=f"{title} (%)")
    axes[0].invert_yaxis()  # the first planner at the top, in all panels (they share the axis)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
