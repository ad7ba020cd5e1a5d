"""vLLM's engine and server on exported models with random weights: greedy tokens equal `generate`'s.

`tests/test_quickstart.py` does the same with trained models.
"""

import json

import numpy as np
import pytest
import torch
from helpers.lora_models import randomize_adapters
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS, randomize_weights, save_part_adapters
from helpers.vllm_environment import make_vllm_environment_or_skip, run_engine, serve
from PIL import Image

from internvl.model.auxiliary_files import read_normalization
from internvl.model.chat_adapter import VLLM_HEAD_CLASSES, VLLM_LORA_RANKS
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.lora import LLM_TARGETS, LoraSettings
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.check_served import load_tiles
from internvl.tools.check_served import main as check_served
from internvl.tools.export_adapters import main as export_adapters
from internvl.tools.internvl_custom2hf import main as custom2hf

pytestmark = pytest.mark.serving

QUESTION, NUM_IMAGES, NUM_TOKENS = "What is it?", 4, 16
# vLLM's CPU kernels need heads of at least 32 elements. Grouped heads: the rows of InternLM2's wqkv are interleaved.
WIDE_LLM = {"hidden_size": 128, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32}
WIDE_VIT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def python():
    return make_vllm_environment_or_skip()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(NUM_IMAGES)]
    for path, width in zip(paths, (56, 120, 56, 60), strict=True):
        Image.fromarray(generator.integers(0, 255, (56, width, 3), dtype=np.uint8)).save(path)
    return paths


def save_run(folder, goldens, llm: str, parts: dict[str, LoraSettings]) -> InternVLChatModel:
    """Save an adapted model in `folder`/run and return it."""
    torch.manual_seed(1)
    config = InternVLChatConfig(
        TINY_VITS["300M"] | WIDE_VIT,
        TINY_LLM | TINY_LLMS[llm] | WIDE_LLM,
        force_image_size=56,
        template="internvl2_5",
        ps_version="v2",
        max_dynamic_patch=4,
        dynamic_image_size=True,
        use_thumbnail=True,
    )
    model = InternVLChatModel(config)
    randomize_weights(model, 0.15)
    for part, settings in parts.items():
        model.add_part_adapters(part, settings)
    randomize_adapters(model, 0.3)
    model.eval().save_pretrained(folder / "run")
    load_tokenizer(goldens / "tokenizer").save_pretrained(folder / "run")
    save_part_adapters(model, folder / "run")
    return model


def generate_ids(folder, images) -> list[list[int]]:
    model, tokenizer = InternVLChatModel.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    answers = []
    for path in images:
        tiles = load_tiles(Image.open(path), model.config, read_normalization(folder))
        context = "<IMG_CONTEXT>" * (model.num_image_token * len(tiles))
        prompt = model.build_prompt(f"<image>\n{QUESTION}", []).replace("<image>", f"<img>{context}</img>")
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(tiles, **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
        answers.append(output[0].tolist())
    return answers


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory, goldens):
    """A run with adapters in all parts, exported for the chat layout."""
    folder = tmp_path_factory.mktemp("internlm2")
    settings = {part: LoraSettings(r, 2 * r) for part, r in (("vision_model", 2), ("mlp1", 3), ("language_model", 4))}
    save_run(folder, goldens, "internlm2", settings)
    flags = ["--layout", "chat", "--write_base", str(folder / "base"), "--with_remote_code"]
    export_adapters([str(folder / "run"), str(folder / "adapter"), *flags])
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory, goldens):
    """A run with adapters in the LLM, exported for the HF layout."""
    folder = tmp_path_factory.mktemp("qwen2")
    save_run(folder, goldens, "qwen2", {"language_model": LoraSettings(4, 6)})
    export_adapters([str(folder / "run"), str(folder / "adapter"), "--write_base", str(folder / "base")])
    custom2hf(["--custom_path", str(folder / "base"), "--save_path", str(folder / "native")])
    return folder


@pytest.fixture(scope="module")
def engine(python, internlm2, qwen2, images, tmp_path_factory):
    common = {"max_tokens": NUM_TOKENS, "questions": [[QUESTION, str(path)] for path in images]}
    jobs = [
        {"model": internlm2 / "base", "adapters": {"adapted": internlm2 / "adapter"}, **common},
        {"model": qwen2 / "native", "adapters": {"adapted": qwen2 / "adapter"}, **common},
    ]
    classes = [name for name in LLM_TARGETS if name != "GptOssForCausalLM"]
    classes += ["InternVLChatModel", "InternVLForConditionalGeneration"]
    return run_engine(python, tmp_path_factory.mktemp("engine"), jobs, classes)


@pytest.mark.parametrize("index, name", enumerate(["internlm2", "qwen2"]), ids=["chat layout", "HF layout"])
def test_base_with_adapters_gives_the_same_tokens(index, name, engine, images, request):
    folder, answers = request.getfixturevalue(name), engine["answers"][index]
    assert answers["base"] == generate_ids(folder / "base", images)
    assert answers["adapted"] == generate_ids(folder / "run", images)
    assert answers["adapted"] != answers["base"]


def test_vllm_adapts_what_the_export_assumes(engine):
    facts = engine["facts"]
    assert tuple(facts["ranks"]) == VLLM_LORA_RANKS
    assert sorted(facts["heads"]) == sorted(VLLM_HEAD_CLASSES)
    assert facts["towers"] == ["InternVLChatModel"]


def test_check_served(python, images, goldens, tmp_path, capsys):
    save_run(tmp_path, goldens, "qwen3", {part: LoraSettings(4, 8) for part in ("vision_model", "language_model")})
    (tmp_path / "run/generation_config.json").write_text('{"repetition_penalty": 1.5}')  # the server applies it
    flags = ["--layout", "chat", "--write_base", str(tmp_path / "base"), "--with_remote_code"]
    export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter"), *flags])
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "A tile."}]
    records = [{"image": path.name, "conversations": turns} for path in images]
    records[0]["conversations"] = [{"from": "human", "value": f"{QUESTION}<image>"}, turns[1]]
    records.append({"conversations": [{"from": "human", "value": "No image?"}, turns[1]]})
    records.append({"image": [images[0].name] * 2, "conversations": turns})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    entry = {"root": str(images[0].parent), "annotation": str(tmp_path / "data.jsonl")}
    (tmp_path / "meta.json").write_text(json.dumps({"tiles": entry}))

    def check(url: str, *flags: str) -> tuple[object, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            check_served([url, str(tmp_path / "run"), str(tmp_path / "meta.json"), "--max_new_tokens", "16", *flags])
        return stop.value.code, capsys.readouterr().out

    # PEFT's folder of one part: its names lack the part, so that vLLM accepts it and adapts nothing.
    adapters = {"adapted": tmp_path / "adapter", "part": tmp_path / "run/language_model"}
    with serve(python, tmp_path / "base", adapters, tmp_path / "server.log") as url:
        status, output = check(url, "--model", "adapted")
        assert status == 0, output
        assert "repetition_penalty" in (tmp_path / "base/generation_config.json").read_text()
        assert "Equal answers           5" in output and "Records skipped         1" in output
        assert "5 answers were cut off after 16 tokens" in output
        assert "tiles line 6: it has 2 images, only records with at most one image" in output
        base_status, base_output = check(url, "--model", "base")
        part_status, part_output = check(f"{url}/v1/", "--model", "part")
        assert base_status == part_status == 1 and "Different answers       5" in base_output
        assert part_output.split("part at")[0] == base_output.split("base at")[0]
        assert check(url, "--model", "tuned")[0] == (
            f"error: {url} serves no model 'tuned': pass --model with one of base, adapted, part"
        )
        assert "serves several models or none: pass --model" in str(check(url)[0])
        assert f"{url} did not answer within 0.001 s" in str(check(url, "--model", "base", "--timeout", "1e-3")[0])
    assert f"{url} is not reachable: [Errno 111] Connection refused" in str(check(url)[0])
