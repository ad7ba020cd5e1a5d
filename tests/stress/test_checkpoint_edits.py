"""Resuming from an edited checkpoint ends in the same result or one sentence."""

import re

import pytest
from stress.checkpoint_edits import CheckpointCases, Edit
from stress.fuzzing import make_source

pytestmark = pytest.mark.stress


@pytest.fixture(scope="module")
def cases(goldens, tmp_path_factory):
    """Train the run whose checkpoint-2 is edited."""
    folder = tmp_path_factory.mktemp("edits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(folder / "cache"))
        yield CheckpointCases(make_source(goldens, folder / "source"), folder / "runs")


def find_edits(cases: CheckpointCases, *names: str) -> list[Edit]:
    return [next(edit for edit in cases.edits if edit.name == name) for name in names]


def describe_findings(cases: CheckpointCases, edits: list[Edit]) -> list[str]:
    results = {edit.name: cases.run(edit) for edit in edits}
    return [f"{name}\n{result}" for name, result in results.items() if result.startswith("finding")]


def test_an_unchanged_checkpoint_gives_the_result_of_the_unbroken_run(cases):
    assert cases.run(Edit("nothing", lambda checkpoint: None)) == "equal"


# Edits that were accepted without a word, or ended in a traceback or a hang; what the sentence says.
KNOWN_EDITS = {
    "trainer_state.json global_step = 1000000000000": "global_step is 1000000000000, expected 2",
    "trainer_state.json global_step = -5": "global_step is -5, expected an integer >= 1",
    "trainer_state.json log_history.0 = 'x'": r"log_history\[0\] is 'x', expected an object with an integer step",
    "trainer_state.json best_model_checkpoint = '../../x'": "best_model_checkpoint is .*, expected a path of a",
    "data_state.json segments.0.num_steps = -5": "data_state.json is invalid: segments.0.*num_steps",
    "data_state.json segments.0.num_steps = 1000000000000": "data_state.json is invalid: .*steps of epoch 0, which has",
    "data_state.json epoch = 1000000000000": "epoch is 1000000000000",
    "data_state.json missing": "has no data_state.json",
    "optimizer.pt state.0.exp_avg = transposed": r"optimizer.pt is invalid: state\[0\].exp_avg has .*, expected floats",
    "optimizer.pt state.0.exp_avg_sq = integers": r"optimizer.pt is invalid: .*exp_avg_sq has dtype torch.int32",
    "optimizer.pt state.0.exp_avg = NaN": r"optimizer.pt is invalid: state\[0\].exp_avg has non-finite values",
    "optimizer.pt FIFO": "optimizer.pt is not a regular file",
    "scheduler.pt last_epoch = -5": "scheduler.pt is invalid: last_epoch is -5, expected an integer from 0 to 2",
    "rng_state.pth missing": "rng_state.pth is missing",
    "rng_state.pth cpu = NaN": "rng_state.pth cannot be loaded: TypeError",
    "language_model/adapter_config.json r = -5": "json is invalid: r is -5, expected 4, as config.json has it",
    "language_model/adapter_config.json use_dora = True": "invalid: use_dora is True, expected False",
    "vision_model/adapter_config.json without r": "invalid: r is 8, expected 4",
    "vision_model/adapter_config.json target_modules.0 = 'x'": "invalid: target_modules is ",
    "vision_model/adapter_config.json alpha_pattern = 'x'": "invalid: alpha_pattern is 'x', expected {}",
    "language_model/adapter_config.json '{'": "adapter_config.json is not JSON",
    "trained.safetensors mlp1.0.bias integers": r"mlp1.0.bias \(expected floating point, got torch.int32\)",
    "language_model/adapter_model.safetensors pointer of Git LFS": "is a pointer of Git LFS",
    "vision_model/adapter_model.safetensors link": "adapter_model.safetensors is a symbolic link",
    "trained.safetensors missing": "missing: mlp1.0.bias",
    "config.json base_model = None": "checkpoint-2",
    "manifest lists '../../outside.txt'": "../../outside.txt is missing",
    "unlisted model.safetensors": "model.safetensors is not in manifest.json",
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_EDITS)
def test_known_edits_are_one_sentence(cases, name):
    (edit,) = find_edits(cases, name)
    result = cases.run(edit)
    assert result.startswith("error: ") and re.search(KNOWN_EDITS[name], result), result


def test_every_hundredth_edit(cases):
    assert not describe_findings(cases, cases.edits[50::100])
