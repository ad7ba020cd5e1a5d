"""Reference cases with LoRA: names, results, merging and training equal upstream's."""

import json

import pytest
import torch
from helpers.model_cases import ModelCase, assert_close, assert_norms_close, get_gradient_norms
from safetensors.torch import load_file

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters


def list_trainable(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def build_adapted_model(case, freeze: tuple[str, ...]) -> InternVLChatModel:
    model = ModelCase(case.base).model()
    for part in freeze:
        getattr(model, part).requires_grad_(False)
    rank = case.meta["r"]
    if case.meta["use_backbone_lora"]:
        model.wrap_backbone_lora(r=rank, lora_alpha=2 * rank)
    if case.meta["use_llm_lora"]:
        model.wrap_llm_lora(r=rank, lora_alpha=2 * rank)
    return model


def test_names_shapes_and_trainable_sets(lora_case):
    meta, model = lora_case.meta, lora_case.model()
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(names) == list(meta["state_dict"]) and names == {n: list(s) for n, s in meta["state_dict"].items()}
    assert list_trainable(model) == meta["trainable_after_from_pretrained"]
    dropouts = [m for n, m in model.named_modules() if n.endswith("lora_dropout.default")]
    assert len(dropouts) == meta["num_dropout_modules_after_from_pretrained"]
    assert all(m.p == 0.05 for m in dropouts)
    settings = {
        "all_frozen": ("vision_model", "language_model", "mlp1"),
        "mlp_trainable": ("vision_model", "language_model"),
        "nothing_frozen": (),
    }
    for setting, freeze in settings.items():
        assert list_trainable(build_adapted_model(lora_case, freeze)) == meta["trainable"][setting], setting


@torch.no_grad()
def test_forward(lora_case):
    model, expected, real = lora_case.model(), lora_case.expected, lora_case.inputs["attention_mask"].bool()
    assert_close(model.extract_feature(lora_case.inputs["pixel_values"]), expected["extract_feature"])
    output = model(**lora_case.batch)
    assert_close(output.logits[real], expected["logits"][real])
    assert_close(output.loss, expected["loss"][0], atol=1e-5)
    for kind in ("token", "sample", "square"):
        weight = lora_case.inputs[f"loss_weight_{kind}"]
        assert_close(model(**lora_case.batch, loss_weight=weight).loss, expected[f"loss_{kind}"][0], atol=1e-5)


def disable_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_gradients(lora_case):
    model, golden = disable_dropout(lora_case.model()).train(), lora_case.read("grads.json")
    loss = model(**lora_case.batch).loss
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    loss.backward()
    norms = get_gradient_norms(model)
    assert_norms_close({name: norms[name] for name in golden["grad_norms"]}, golden["grad_norms"])
    assert {name for name, norm in norms.items() if norm is not None} <= set(golden["grad_norms"])


@torch.no_grad()
def check_logits(model, case, expected):
    output = model(**case.batch)
    assert_close(output.loss, expected["loss"][0], atol=1e-5)
    lengths = case.inputs["attention_mask"].sum(1)
    if "logits" in expected:
        real = case.inputs["attention_mask"].bool()
        assert_close(output.logits[real], expected["logits"][real])
    if "logits_last" in expected:
        assert_close(output.logits[torch.arange(len(lengths)), lengths - 1], expected["logits_last"])


def test_merge(lora_case, tmp_path):
    merged = merge_adapters(lora_case.model())
    assert merged.config.use_backbone_lora == merged.config.use_llm_lora == 0
    weights = lora_case.read("merged/weights.json")
    state = merged.state_dict()
    assert sorted(state) == sorted(weights)
    for name, (shape, norm, total) in ((n, list(w.values()) if isinstance(w, dict) else w) for n, w in weights.items()):
        assert list(state[name].shape) == list(shape)
        assert state[name].norm().item() == pytest.approx(norm, rel=1e-5)
        assert state[name].double().sum().item() == pytest.approx(total, rel=1e-4, abs=1e-4)
    if (lora_case.folder / "merged" / "model.safetensors").exists():
        for name, tensor in lora_case.read("merged/model.safetensors").items():
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)
    expected = lora_case.read("merged/expected.safetensors")
    check_logits(merged, lora_case, expected)
    merged.save_pretrained(tmp_path)
    reloaded = InternVLChatModel.from_pretrained(tmp_path)
    reloaded.img_context_token_id = lora_case.meta["img_context_token_id"]
    check_logits(reloaded, lora_case, expected)


def test_merge_in_bfloat16(lora_case):
    if not (lora_case.folder / "merged_bf16").exists():
        pytest.skip("not recorded for this model")
    expected = lora_case.read("merged_bf16/expected.safetensors")
    check_logits(lora_case.model("merged_bf16", dtype=torch.float32), lora_case, expected)

    merged = merge_adapters(lora_case.model(dtype=torch.bfloat16))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = merged.float()(**lora_case.batch).logits
    last = lora_case.inputs["attention_mask"].sum(1) - 1
    assert_close(logits[torch.arange(len(last)), last], expected["logits_last"], atol=0.1)


def test_trajectory(trajectory):
    """Eight AdamW steps on adapters: the same losses, gradients and final weights."""
    golden = json.loads(trajectory.read_text())
    case = ModelCase((trajectory.parent / golden["base"]).resolve())
    model = case.model()
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    settings = {"lora_alpha": golden["lora_alpha"], "lora_dropout": golden["lora_dropout"]}
    if golden["use_backbone_lora"]:
        model.wrap_backbone_lora(r=golden["use_backbone_lora"], **settings)
    if golden["use_llm_lora"]:
        model.wrap_llm_lora(r=golden["use_llm_lora"], **settings)
    model.mlp1.requires_grad_(not golden["freeze_mlp"])
    incompatible = model.load_state_dict(load_file(trajectory.parent / golden["lora_init"]), strict=False)
    assert not incompatible.unexpected_keys

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial_norms = {name: norm for name, norm in golden["init_norms"].items() if norm is not None}
    assert_norms_close({name: trainable[name].norm().item() for name in initial_norms}, initial_norms)
    inputs = [load_file(trajectory.parent / name) for name in golden["batches"]]
    batches = [{name: batch[name] for name in case.batch} for batch in inputs]
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    model.train()
    for step, index in enumerate(golden["batch_order"]):
        loss = model(**batches[index]).loss
        loss.backward()
        assert loss.item() == pytest.approx(golden["losses"][step], abs=5e-5), step
        norms = {name: None if p.grad is None else p.grad.norm().item() for name, p in trainable.items()}
        total = sum(n**2 for n in norms.values() if n is not None) ** 0.5
        assert total == pytest.approx(golden["grad_norms_total"][step], rel=1e-4), step
        if step == 0:
            assert_norms_close(norms, golden["first_step_grad_norms"])
        optimizer.step()
        optimizer.zero_grad()
    assert_norms_close({name: p.norm().item() for name, p in trainable.items()}, golden["final_norms"])
    model.eval()
    with torch.no_grad():
        for batch, loss in zip(batches, golden["eval_loss_after"], strict=True):
            assert model(**batch).loss.item() == pytest.approx(loss, abs=5e-5)
