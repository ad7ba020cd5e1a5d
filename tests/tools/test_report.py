"""tools/report.py writes a page for any run, whatever state its files are in."""

import json
import os
import re
import shutil

import pytest
from helpers.evaluation_runs import FOLLOW_LOSS, read_evaluations, write_evaluation_meta
from helpers.report_pages import Page, append_lines, make_prediction, make_step, write_evaluation
from helpers.training_runs import TRAIN_ADAPTERS, read_losses, run_training
from PIL import Image

from internvl.tools.report import main as write_report
from internvl.tools.report_page.run_files import read_run
from internvl.tools.report_page.samples_section import NUM_SHOWN
from internvl.tools.report_page.settings_section import find_set_flags
from internvl.tools.report_page.thumbnails import MAX_PAGE_BYTES

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--\ud800"


@pytest.fixture
def folder(tmp_path):
    """Write a run of 40 steps with two evaluations."""
    run = tmp_path / "out"
    append_lines(run / "metrics.jsonl", *map(make_step, range(1, 41)))
    first = [make_prediction(line, "a dog") for line in range(1, 5)]
    last = [make_prediction(1, "a dog", loss=2.0), *(make_prediction(line) for line in range(2, 5))]
    write_evaluation(run, 20, first, **{"pets/loss": 1.25, "pets/exact_match": 0.0})
    interval = {"pets/exact_match_low": 0.3006, "pets/exact_match_high": 0.9544}
    write_evaluation(run, 40, last, **{"pets/loss": 0.625, "pets/exact_match": 0.75}, **interval)
    return run


def render(folder, *flags) -> Page:
    write_report([str(folder), *map(str, flags)])
    return Page(folder / "report.html").check()


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_real_run_that_is_resumed(tiny_inputs, tmp_path):
    """Numbers are those of the files; changed flags are shown where the run resumed."""
    run = tmp_path / "out"
    flags = [*TRAIN_ADAPTERS, *FOLLOW_LOSS, "--eval_meta_path", str(write_evaluation_meta(tiny_inputs, tmp_path))]
    run_training(tiny_inputs, run, *flags, "--max_steps", "3")
    assert "finished step 3 of 3" in render(run).text
    run_training(tiny_inputs, run, *flags, "--learning_rate", "5e-4")
    page = render(run)
    assert "finished step 6 of 6" in page.text
    for step, loss in enumerate(read_losses(run), 1):
        assert f"step {step} loss: {loss:.4g}" in page.text
    for step, metrics in read_evaluations(run).items():
        for name in ("loss", "token_accuracy", "exact_match"):
            assert f"step {step} held: {metrics[f'eval/held/{name}']:.4g}" in page.text
    assert page.text.count("held, line") >= 2 * 2 and "Before: step 2. After: step 6." in page.text
    summary = json.loads((run / "run.json").read_text())
    for row in summary["trainable"]:
        assert f"{row['parameters']:,} {row['trainable']:,} {row['lora_rank']}" in page.text
    assert [row["lora_rank"] for row in summary["trainable"]] == ["4", "-", "4"]
    [dataset] = summary["samples"].values()
    assert f"{dataset['samples']:,} {dataset['usable']:,} {dataset['tokens']:,} {dataset['loss_tokens']:,}" in page.text
    assert "--learning_rate 0.001 → 0.0005" in page.text
    assert "resumed from checkpoint-3 with other settings" in page.text
    assert "use_backbone_lora 4" in page.text and f"torch {summary['versions']['torch']}" in page.text
    # Without run.json, as before it was written: adapters are counted.
    (run / "run.json").unlink()
    page = render(run)
    for row in summary["trainable"]:
        assert (f"{row['part']} {row['trainable']:,} 4" in page.text) == (row["lora_rank"] == "4")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_of_training(folder):
    page = render(folder)
    assert "stopped step 40, epoch 0.8" in page.text
    assert "Time 80 s of all steps" in page.text
    assert "Throughput 1234 tokens/s" in page.text and "MFU 41.5 %" in page.text and "Peak memory 7.25 GiB" in page.text
    assert "step 30 loss: 0.6694" in page.text  # 3 exp(-30 / 20)
    assert "data wait: 0.2" in page.text and "other: 0.2" in page.text  # of steps of 2 s


def test_numbers_of_evaluations(folder):
    page = render(folder)
    assert "Best loss, pets 0.625 step 40" in page.text
    assert "pets exact match ↑ 0 0.75 at 40 0.75 0.3006 – 0.9544" in page.text
    assert "pets loss ↓ 1.25 0.625 at 40 0.625" in page.text
    assert "step 40 pets: 0.75 (0.3006 - 0.9544)" in page.text


def test_best_evaluation_is_that_of_the_chosen_metric(folder):
    write_evaluation(folder, 30, [make_prediction(1)], **{"pets/loss": 0.5, "pets/exact_match": 0.875})
    (folder / "checkpoint-30").mkdir()
    for metric in ("eval/pets/exact_match", "eval_pets/exact_match", "pets/exact_match"):
        (folder / "run.json").write_text(json.dumps({"flags": {"metric_for_best_model": metric}, "max_steps": 60}))
        page = render(folder)
        assert "Best exact match, pets 0.875 checkpoint-30" in page.text
    assert "stopped step 40 of 60" in page.text and "40 s left" in page.text


def test_best_evaluation_by_a_name_without_a_set_is_over_all_sets(folder):
    values = {"pets/loss": 0.5, "more/loss": 1.0, "evals/loss": 2.25, "loss": 1.25}
    write_evaluation(folder, 40, [make_prediction(1)], **values)
    for metric in ("eval/loss", "eval_loss", "loss", None):
        (folder / "run.json").write_text(json.dumps({"flags": {"metric_for_best_model": metric}}))
        assert "Best loss 1.25 step 40" in render(folder).text
    (folder / "run.json").write_text(json.dumps({"flags": {"metric_for_best_model": "evals/loss"}}))
    assert "Best loss, evals 2.25 step 40" in render(folder).text


def test_lower_is_better_where_the_metrics_say_so(folder):
    metrics = folder / "evaluation/step-40/metrics.json"
    content = json.loads(metrics.read_text())
    content["sets"]["pets"] |= {"greater_is_better": False}
    metrics.write_text(json.dumps(content))
    assert "pets exact match ↓ 0 0 at 20 0.75" in render(folder).text
    write_evaluation(folder, 40, [make_prediction(1)], **{"pairs/nll_loss": 0.5})  # by its name
    assert "pairs nll loss ↓ 0.5" in render(folder).text
    write_evaluation(folder, 40, [make_prediction(1)], **{"text/cer": 0.5, "text/cer_mean": 0.25})
    assert "text cer mean ↓ 0.25" in render(folder).text


def test_means_of_one_set_are_not_repeated(folder):
    assert "all sets" not in render(folder).text
    values = {"pets/loss": 0.5, "loss": 0.5, "base/loss": 0.125, "base/perplexity": 1.1, "forgetting": 0.125}
    write_evaluation(folder, 40, [make_prediction(1)], **values)
    metrics = folder / "evaluation/step-40/metrics.json"
    content = json.loads(metrics.read_text())
    content["sets"]["base"] = content["sets"]["pets"] | {"split": "base_answers", "greater_is_better": None}
    metrics.write_text(json.dumps(content))
    text = render(folder).text
    assert "all sets forgetting ↓ 0.125" in text and "all sets loss" not in text and "base loss" not in text
    write_evaluation(folder, 40, [make_prediction(1)], **values, **{"more/loss": 0.5})
    assert "all sets loss" in render(folder).text


def test_evaluations_of_preference_pairs(tmp_path):
    values = {"loss": 0.5, "rewards/accuracies": 0.75, "logps/chosen": -3.0}
    metrics = {f"eval/{prefix}{name}": value for prefix in ("", "a/", "b/") for name, value in values.items()}
    append_lines(tmp_path / "metrics.jsonl", make_step(1), {"step": 1, **metrics})
    text = render(tmp_path).text
    for set_name in ("a", "b", "all sets"):
        assert f"{set_name} rewards/accuracies ↑ 0.75" in text and f"{set_name} logps/chosen ↑ -3" in text


def test_preference_runs_and_other_keys_have_charts(tmp_path):
    values = {"rewards/accuracies": 0.75, "rewards/margins": 0.5, "logps/chosen": -12.0, "my_own_number": 77.0}
    append_lines(tmp_path / "metrics.jsonl", *(make_step(step, **values) for step in (1, 2)))
    text = render(tmp_path).text
    for title, number in {"Reward accuracy": "0.75", "Log probabilities": "-12", "my_own_number": "77"}.items():
        assert title in text and number in text


def test_skipped_steps_are_counted_over_resumes(tmp_path):
    counts = {10: 1, 20: 3, 30: 0, 40: 1}  # the count begins again when a run resumes
    entries = (make_step(step, **({"skipped_steps": count} if count else {})) for step, count in counts.items())
    append_lines(tmp_path / "metrics.jsonl", *entries)
    assert "Skipped steps: 4 , reported at step 10, 20 (2 steps), 40." in render(tmp_path).text


def test_unusable_samples_are_listed_once(folder):
    sentences = [f"pets line {line} (/data/pets.jsonl): {ATTACK}" for line in range(30)]
    append_lines(folder / "skipped_samples.jsonl", *({"sample": sentence} for sentence in sentences + sentences[:5]))
    page = render(folder)
    assert "Unusable samples: 30" in page.text and "and 10 more" in page.text


def test_flags_that_differ_from_their_defaults():
    flags = {"learning_rate": 5e-05, "use_llm_lora": 16, "grad_checkpoint": True, "report_to": []}
    assert find_set_flags(flags | {"use_thumbnail": True}) == {"use_llm_lora": 16, "use_thumbnail": True}
    assert find_set_flags({"llm_weight_decay": 0.0, "llm_lr": None}) == {"llm_weight_decay": 0.0}


# -- states ------------------------------------------------------------------------------------------------------------


def test_run_in_progress(folder):
    (folder / "run.lock").write_text("{}")
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 41, "lo')  # is being written
    page = render(folder)
    assert "running step 40" in page.text and "damaged" not in page.text
    os.utime(folder / "run.lock", (0, 0))
    assert "stopped step 40" in render(folder).text


def test_trainer_state_of_an_earlier_run_is_not_used(folder):
    state = {"global_step": 813, "max_steps": 813, "log_history": [{"step": 813, "loss": 0.5}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert "stopped step 40," in render(folder).text
    state |= {"global_step": 42, "log_history": [make_step(40), {"step": 42, "train_loss": 1.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(state | {"max_steps": 99}))
    assert "finished step 42 of 99, stopped early" in render(folder).text


def test_log_history_without_metrics_file(tmp_path):
    history = [make_step(10), {"step": 10, "eval_pets/loss": 0.125, "eval_runtime": 3.0, "eval_steps_per_second": 9.0}]
    checkpoint = tmp_path / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": history}))
    run = read_run(tmp_path)
    assert run.evaluations == {10: {"pets/loss": 0.125}} and list(run.training) == [10]
    assert "pets loss ↓ 0.125" in render(tmp_path).text


def test_evaluation_without_training(folder):
    """The folder of tools/evaluate.py."""
    shutil.copytree(folder / "evaluation/step-40", folder.parent / "alone")
    page = render(folder.parent / "alone")
    assert (
        page.text.startswith("alone alone finished")
        and "pets exact match ↑ 0.75" in page.text
        and "Training" not in page.text
        and "a dog" in page.text
    )


def test_evaluations_after_the_last_step_are_of_an_earlier_run(folder):
    shutil.copytree(folder / "evaluation/step-40", folder / "evaluation/step-900")
    assert list(read_run(folder).evaluations) == [20, 40]


DAMAGED_FILES = {
    "metrics.jsonl": b'{"step": 1, "loss": "high"}\nnot JSON\n[1]\n\xff\xfe\n{"step": 1e99, "loss": 1}\n',
    "trainer_state.json": b'{"global_step": "many", "log_history": 7}',
    "run.json": b'{"flags": 7, "datasets": [], "versions": null, "changes": 3, "trainable": [1], "samples": 5}',
    "skipped_samples.jsonl": b"{\n",
    "evaluation/step-40/metrics.json": b"{}",
    "evaluation/step-40/predictions.jsonl": b'{"set": 5}\n',
    "config.json": b"\0\0",
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
@pytest.mark.parametrize("content", ["damaged", "empty", "cut", "nested", "FIFO"])
def test_damaged_files_are_named(folder, name, content):
    """The page shows the rest; nothing waits or fails."""
    file = folder / name
    before = file.read_bytes() if file.exists() else b'{"flags": {"learning_'
    file.unlink(missing_ok=True)
    damages = {"damaged": DAMAGED_FILES[name], "empty": b"", "cut": before[: len(before) // 2]}
    if content == "FIFO":
        os.mkfifo(file)
    else:
        file.write_bytes(damages.get(content, b"[" * 10**6))
    page = render(folder)
    assert "Evaluation" in page.text
    # An incomplete last line is being written. `config.json` is read only where it is needed.
    is_listed = content == "FIFO" or (content == "nested" and file.suffix == ".json")
    assert not is_listed or file.name in page.text or name == "config.json"


def test_values_of_wrong_types_are_left_out(folder):
    values = {"loss": "1", "grad_norm": True, "tokens_per_second": None, "mfu_percent": 10**400, "x": [1], "y": {}}
    append_lines(folder / "metrics.jsonl", make_step(41, **values), {"step": 42, "eval/pets/loss": "nan"})
    append_lines(folder / "metrics.jsonl", *({"step": step, "loss": 1} for step in (-1, True, 2**70, None)))
    extremes = (1.7e308, -1.7e308, 5e-324, 1e-320, 10**400, float("nan"), float("-inf"))
    append_lines(folder / "metrics.jsonl", *(make_step(43, loss=value, grad_norm=value) for value in extremes))
    append_lines(folder / "metrics.jsonl", *(make_step(44 + n, tflops=value) for n, value in enumerate(extremes)))
    predictions = [make_prediction(n, score=value, loss=value) for n, value in enumerate(extremes[:5])]
    write_evaluation(folder, 44, predictions, **{"pets/loss": 1e308, "pets/anls": 1e-320})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10**400, "max_steps": 10**400}))
    (folder / "run.json").write_text(json.dumps({"max_steps": 10**400, "world_size": 10**400}))
    assert "step 50" in render(folder).text


def test_no_run(tmp_path):
    for path, message in {tmp_path: "holds no run", tmp_path / "gone": "is not a folder"}.items():
        with pytest.raises(SystemExit, match=message):
            write_report([str(path)])
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_a_file(folder, tmp_path):
    for path, message in {tmp_path: "is a folder", tmp_path / "no/x.html": "the folder .*no does not exist"}.items():
        with pytest.raises(SystemExit, match=f"error: --output {path}.*{message}"):
            write_report([str(folder), "--output", str(path)])


def test_other_files_are_not_overwritten(folder, tmp_path):
    for _ in range(2):
        write_report([str(folder), "--output", str(tmp_path / "page.html")])
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(SystemExit, match="mine.html exists and is not a report"):
        write_report([str(folder), "--output", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == "mine"


# -- samples -----------------------------------------------------------------------------------------------------------


def test_texts_are_escaped(folder):
    """Every text of a run may contain HTML."""
    prediction = make_prediction(9, ATTACK, question=ATTACK * 30, references=[ATTACK], history=[[ATTACK, ATTACK]])
    prediction |= {"set": ATTACK, "file": ATTACK, "images": [ATTACK], "metric": ATTACK}
    write_evaluation(folder, 40, [prediction], **{f"{ATTACK}/loss": 1.0, ATTACK: 2.0})
    metrics = folder / "evaluation/step-40/metrics.json"
    content = json.loads(metrics.read_text())
    content["sets"] = {ATTACK: content["sets"]["pets"]}
    metrics.write_text(json.dumps(content))
    record = {"flags": {ATTACK: ATTACK}, "datasets": {ATTACK: {"annotation": ATTACK}}, "versions": {ATTACK: ATTACK}}
    record |= {"changes": [{"from": "checkpoint-4", "flags": {ATTACK: [ATTACK, ATTACK]}}, {"from": ATTACK}]}
    record |= {"trainable": [{"part": ATTACK, "lora_rank": ATTACK}], "samples": {ATTACK: {"samples": ATTACK}}}
    (folder / "run.json").write_text(json.dumps(record))
    append_lines(folder / "metrics.jsonl", make_step(41, **{ATTACK: 1.0}))
    page = render(folder)
    assert page.text.count(ATTACK[:-1]) > 15
    assert not [attrs for attrs in page.find("img") if attrs.get("src") == "x"]


def test_images_videos_and_what_is_missing(folder, tmp_path):
    Image.effect_noise((800, 400), 90).convert("RGB").save(tmp_path / "wide.png")
    (tmp_path / "frames").mkdir()
    for index in range(3):
        Image.new("RGB", (64, 48), (0, 80 * index, 0)).save(tmp_path / f"frames/{index}.png")
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "fifo.png")
    wide = str(tmp_path / "wide.png")
    media = [
        {"images": [wide]},
        {"images": [wide] * 6},
        {"video": str(tmp_path / "frames")},
        {"images": [str(tmp_path / "gone.png")]},
        {"images": [str(tmp_path / "text.png")]},
        {"images": [str(tmp_path / "fifo.png")]},
        {"images": ["s3://bucket/a.png", 7, None]},
        {"video": str(tmp_path / "gone.mp4")},
        {"images": []},
    ]
    predictions = [make_prediction(line, **entry) for line, entry in enumerate(media, 1)]
    write_evaluation(folder, 40, predictions, **{"pets/loss": 0.5})
    page = render(folder)
    sizes = [(img["width"], img["height"]) for img in page.find("img")]
    assert set(sizes) == {("320", "160"), ("160", "80"), ("64", "48")} and "and 2 more images" in page.text
    for name, reason in {
        "gone.png": "does not exist",
        "text.png": "cannot be read",
        "fifo.png": "cannot be read",
        "s3://bucket/a.png": "not loaded: it is remote",
        "gone.mp4": "does not exist",
    }.items():
        assert any(name in part and reason in part[:400] for part in page.source.split('class="missing"')[1:])


def test_page_stays_small(folder, tmp_path):
    predictions = []
    for line in range(1, 60):
        path = tmp_path / f"{line}.png"
        Image.merge("RGB", [Image.effect_noise((320, 320), 200) for _ in range(3)]).save(path, compress_level=1)
        predictions.append(make_prediction(line, "a dog " * 1000, question="why " * 9000, images=[str(path)]))
    write_evaluation(folder, 40, predictions, **{"pets/loss": 0.5})
    page = render(folder)
    assert sum(len(img["src"]) for img in page.find("img")) <= MAX_PAGE_BYTES
    assert "left out, as the page is full" in page.text


def test_answers_before_and_after(folder, tmp_path):
    page = render(folder)
    assert "Before: step 20. After: step 40. 4 samples. 3 improved, 0 worsened." in page.text
    card = "pets, line 1 score 0 → 0 · loss 0.5 → 2 question What is it? reference a cat before a dog after a dog"
    assert card in page.text
    base = tmp_path / "base"
    shutil.copytree(folder / "evaluation/step-40", base)
    page = render(folder, "--base", base)
    assert "0 improved, 0 worsened" in page.text and f"Before: {base}. After: step 40." in page.text
    (base / "predictions.jsonl").unlink()
    with pytest.raises(SystemExit, match="--base .*base has no predictions.jsonl"):
        render(folder, "--base", base)


def test_tabs_show_worst_changed_and_random_samples(folder):
    scores = {line: line / 100 for line in range(1, 101)}
    before = [make_prediction(line, "x", score=0.5) for line in scores]
    after = [make_prediction(line, "y" if line % 2 else "x", score=score) for line, score in scores.items()]
    write_evaluation(folder, 20, before, **{"pets/loss": 1.0})
    write_evaluation(folder, 40, after, **{"pets/loss": 1.0})
    page = render(folder)
    assert render(folder).text.split("Written")[0] == page.text.split("Written")[0]
    panels = page.text.split("pets, line ")
    lines = [int(part.split()[0]) for part in panels[1:]]
    worst, changed, drawn = (lines[start : start + NUM_SHOWN] for start in (0, NUM_SHOWN, 2 * NUM_SHOWN))
    assert worst == list(range(1, NUM_SHOWN + 1)) and len(drawn) == NUM_SHOWN
    assert sorted(changed) == [1, 3, 5, 7, 9, 11, 89, 91, 93, 95, 97, 99]


def test_samples_without_scores_are_shown_only_where_none_has_one(folder):
    unanswered = {"prediction": None, "score": None}
    lines = [make_prediction(1), make_prediction(2, **unanswered)]
    lines += [make_prediction(n, **unanswered, set="texts") for n in (1, 2)]
    lines += [make_prediction(n, **unanswered, set="base") for n in (1, 2)]
    write_evaluation(folder, 40, lines, **{"pets/loss": 1.0})
    metrics = folder / "evaluation/step-40/metrics.json"
    content = json.loads(metrics.read_text())
    content["sets"]["base"] = content["sets"]["pets"] | {"split": "base_answers"}
    metrics.write_text(json.dumps(content))
    page = render(folder)
    assert "3 samples" in page.text
    assert set(re.findall(r"(\w+, line \d)", page.text)) == {"pets, line 1", "texts, line 1", "texts, line 2"}


def test_samples_without_answers_are_compared_by_loss(folder):
    losses = {1: (1.0, 0.5), 2: (1.0, 3.0), 3: (1.0, 1.0)}
    for step, position in ((20, 0), (40, 1)):
        lines = [make_prediction(n, None, score=None, metric=None, loss=pair[position]) for n, pair in losses.items()]
        write_evaluation(folder, step, lines, **{"pets/loss": 1.0})
    page = render(folder)
    assert "1 improved, 1 worsened" in page.text
    worst = page.text.split("pets, line ")[1]
    assert worst.startswith("2 loss 1 → 3")
