"""tools/estimate_memory.py estimates recipes and checkpoint folders, without a GPU."""

import json

import pytest
from helpers.paths import REAL_CONFIGS, REPO_ROOT, VISION_LORA_RECIPE

from internvl.planning.memory_estimate import GIB
from internvl.tools import estimate_memory
from internvl.tools.benchmark.sizes import MODEL_SIZES, build_config

# InternVL2.5 has the shapes of these; their LLM's vocabulary differs by a few tokens.
SAME_SHAPES = {"internvl2_8b": "8B", "internvl2_26b": "26B", "internvl3_1b": "1B"}
BILLIONS = {"1B": 0.94, "2B": 2.21, "4B": 3.71, "8B": 8.08, "26B": 25.5, "38B": 38.4, "78B": 78.4}  # as published


@pytest.fixture
def estimate(capsys):
    """Return a function that runs the tool: label of a line -> its columns."""

    def run(*argv) -> dict[str, list[str]]:
        estimate_memory.main(list(map(str, argv)))
        _, table = capsys.readouterr().out.rsplit("\n\n", 1)
        return {line[:22].strip(): line[22:].split() for line in table.splitlines()}

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the configuration of a small model, and nothing else."""
    build_config(MODEL_SIZES["tiny"]).save_pretrained(tmp_path)
    return tmp_path


FLAGS = "--force_image_size 168 --max_packed_tokens 2048 --bf16 True --report_to none".split()


def test_a_recipe_with_flags(estimate, checkpoint):
    lines = estimate(VISION_LORA_RECIPE, "--gpus", 2, "--model_name_or_path", checkpoint, *FLAGS)
    header = lines.pop("")
    assert header == "weights gradients optimizer activations buffers context total 80 GB 40 GB 24 GB".split()
    assert [*lines] == ["these flags", *estimate_memory.VARIANTS]
    assert all(columns[-3:] == ["yes"] * 3 for columns in lines.values())
    activations = {label: float(columns[3]) for label, columns in lines.items()}
    shares = ["recompute all layers", "recompute 4 of 5", "these flags", "recompute every 2nd", "recompute none"]
    assert [activations[label] for label in shares] == sorted(activations[label] for label in shares)
    assert activations["recompute all layers"] < activations["recompute none"]
    assert activations["all, half the tokens"] <= activations["recompute all layers"]


def test_zero3_and_full_training_have_no_line_with_qlora(estimate, checkpoint):
    flags = ["--model_name_or_path", checkpoint, *FLAGS]
    lines = estimate(VISION_LORA_RECIPE, "--gpus", 2, *flags, "--deepspeed", "zero_stage3_config.json")
    assert "all, QLoRA" not in lines and "recompute none" in lines
    lines = estimate(*flags, "--use_packed_ds", "True", "--only_these_flags")
    assert [*lines] == ["", "these flags"]


def test_automatic_sizes_are_those_of_training(estimate, checkpoint, tmp_path):
    """transformers derives them from the LLM's hidden size."""
    hidden_size = MODEL_SIZES["tiny"].llm["hidden_size"]
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    flags = ["--model_name_or_path", checkpoint, *FLAGS, "--use_packed_ds", "True", "--only_these_flags"]
    flags += "--use_llm_lora 16 --freeze_llm True --freeze_mlp True --freeze_backbone True --gpus 2".split()
    lines = []
    for values in (sizes, dict.fromkeys(sizes, "auto")):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3, **values}}))
        lines.append(estimate(*flags, "--deepspeed", tmp_path / "zero.json"))
    assert lines[0] == lines[1]


def test_the_8b_recipe_fits_three_quarters_of_80_gb():
    flags = estimate_memory.read_recipe_flags(str(VISION_LORA_RECIPE), 1, [])
    assert flags == estimate_memory.read_recipe_flags("internvl2.5/8b_vit_lora", 1, [])
    memory = estimate_memory.estimate(estimate_memory.parse_training_flags(flags), num_gpus=1)
    assert memory.weights / GIB == pytest.approx(16.24e9 / GIB, rel=0.01)
    assert memory.optimizer / 16 == pytest.approx(44.0e6, rel=0.01), "adapters of rank 16 in vision encoder and LLM"
    assert 45 * GIB < memory.total < 0.75 * estimate_memory.GPU_GIB["80 GB"] * GIB


@pytest.mark.parametrize("path", REAL_CONFIGS, ids=lambda path: path.stem)
def test_built_in_shapes_are_those_of_published_configurations(path):
    published = json.loads(path.read_text())
    built_in = estimate_memory.PUBLISHED_SHAPES[f"OpenGVLab/InternVL2_5-{SAME_SHAPES[path.stem]}"]
    for part, shape in zip(("vision_config", "llm_config"), built_in, strict=True):
        names = shape.keys() & published[part].keys() - {"vocab_size", "bias", "rope_scaling"}
        assert {"hidden_size", "num_hidden_layers", "num_attention_heads"} <= names
        assert {name: shape[name] for name in names} == {name: published[part][name] for name in names}


@pytest.mark.parametrize("name", estimate_memory.PUBLISHED_SHAPES)
def test_built_in_shapes_have_the_published_number_of_parameters(name):
    flags = f"--model_name_or_path {name} --output_dir x --freeze_llm True --freeze_backbone True".split()
    model = estimate_memory.build_model(*estimate_memory.parse_training_flags(flags))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == pytest.approx(BILLIONS[name.rsplit("-")[-1]] * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"),
    [("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("lion_32bit", 4), ("paged_ademamix_8bit", 3), ("adafactor", 0)],
)
def test_bytes_of_optimizer_states(optimizer, num_bytes):
    assert estimate_memory.get_moment_bytes(optimizer) == num_bytes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "0"], "--gpus 0 is invalid: expected an integer from 1"),
        (["--use_llm_lora", "16"], "--model_name_or_path is required"),
        (["no_recipe.sh"], "unknown recipe: 'no_recipe.sh'"),
        (["internvl2.5/8b_vit_lor"], "unknown recipe: .*; did you mean internvl2.5/8b_vit_lora?"),
        (
            [VISION_LORA_RECIPE.parents[1] / "internvl3_5_qwen3/internvl3_5_1b_mpo.sh"],
            "is not supported: expected one of supervised fine-tuning",
        ),
        (["--model_name_or_path", "x", "--use_lora", "1"], "--use_lora"),
        ([REPO_ROOT / "shell/quickstart.sh"], "quickstart.sh' is not a recipe: it does not end with"),
        (["--max_packed_tokens", "0"], "--max_packed_tokens 0 is invalid: expected an integer >= 1"),
        (["--grad_checkpoint_ratio", "0"], "--grad_checkpoint_ratio 0.0 is invalid"),
        (["--quantize_llm", "True"], "--quantize_llm True requires --use_llm_lora"),
        (
            ["--model_name_or_path", "OpenGVLab/InternVL2_5-1B", "--force_image_size", "100"],
            "An image size of 100 pixels is invalid: expected a multiple of 28",
        ),
    ],
)
def test_user_errors(argv, message):
    with pytest.raises(SystemExit, match=message):
        estimate_memory.main(list(map(str, argv)))
