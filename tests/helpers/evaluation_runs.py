"""Flags and results of tiny runs that evaluate."""

import json
from pathlib import Path

FOLLOW_LOSS = ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_num_samples", "2", "--eval_max_new_tokens", "4"]


def write_evaluation_meta(
    tiny_inputs: Path, folder: Path, metric: str | None = "exact_match", num_records: int = 4
) -> Path:
    """Write a meta file of one evaluation set, `held`, of the first records of the tiny training data."""
    records = map(json.loads, (tiny_inputs / "train.jsonl").read_text().splitlines())
    asked = [record for record in records if record["conversations"][0]["from"] == "human"][:num_records]
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (entry,) = json.loads((tiny_inputs / "meta.json").read_text()).values()
    entry |= {"annotation": str(folder / "held.jsonl")} | ({"metric": metric} if metric else {})
    meta = folder / "eval.json"
    meta.write_text(json.dumps({"held": entry}))
    return meta


def read_evaluations(output: Path) -> dict[int, dict]:
    """Read the evaluations in `metrics.jsonl`: step -> metrics."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_seconds" in line]
    assert len({line["step"] for line in evaluations}) == len(evaluations), "a step was evaluated twice"
    return {line["step"]: line for line in evaluations}


def read_state(output: Path) -> dict:
    return json.loads((output / "trainer_state.json").read_text())
