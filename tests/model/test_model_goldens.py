"""Every tiny model that upstream computed: the same numbers from the same checkpoint."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.model_cases import check_norms, close, gradient_norms

from internvl.model.internvl_chat.documents import REDUCTIONS, document_weights

# Ids generated from embeddings alone begin, in transformers 4, with a placeholder; so do the recorded ones.
PLACEHOLDER = 0 if transformers.__version__.startswith("4.") else 1


@torch.no_grad()
def test_forward_features_hidden_states_and_losses(model_case):
    model, expected, inputs = model_case.model(), model_case.expected, model_case.inputs
    assert model.num_image_token == model_case.meta["num_image_token"]
    assert sorted(model.state_dict()) == model_case.meta["state_dict_keys"]
    close(model.extract_feature(inputs["pixel_values"]), expected["extract_feature"])
    vision = model.vision_model(inputs["pixel_values"], output_hidden_states=True)
    close(vision.last_hidden_state, expected["vision_last_hidden_state"])
    assert len(vision.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    close(vision.pooler_output, expected["vision_last_hidden_state"][:, 0])
    if "vision_selected_hidden_state" in expected:
        close(vision.hidden_states[model.select_layer], expected["vision_selected_hidden_state"])

    real = inputs["attention_mask"].bool()
    output = model(**model_case.batch)
    close(output.logits[real], expected["logits"][real])
    close(output.loss, expected["loss"][0], atol=1e-5)
    with_positions = model(**model_case.batch, position_ids=inputs["position_ids"])
    close(with_positions.logits[real], expected["logits"][real])
    for kind in ("token", "sample", "square"):
        for weight in (inputs[f"loss_weight_{kind}"], inputs[f"loss_weight_{kind}"].tolist()):
            close(model(**model_case.batch, loss_weight=weight).loss, expected[f"loss_{kind}"][0], atol=1e-5)


def test_gradients_and_training_loss(model_case):
    model, golden = model_case.model().train(), model_case.read("grads.json")
    output = model(**model_case.batch)
    assert output.logits is None  # the full logits never exist in training
    assert output.loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    output.loss.backward()
    check_norms(gradient_norms(model), golden["grad_norms"])


def test_generate(model_case):
    """Recorded one after the other on one model: where upstream's rotary base stays enlarged (see `test_rope_scaling`),
    only the first answer is that of the question alone, and only the first is compared."""
    model, inputs, golden = model_case.model(), model_case.inputs, model_case.read("generate.json")
    if model_case.meta.get("rope", {}).get("short_changes_after_long"):
        golden = golden[:1]
    tiles = torch.tensor(model_case.meta["tiles_per_sample"]).clamp(min=1)  # a text sample holds one placeholder tile
    for row in golden:
        sample = row["sample"]
        first = int(tiles[:sample].sum())
        ids = inputs["input_ids"][sample : sample + 1, : row["prompt_len"]]
        pixels = (
            inputs["pixel_values"][first : first + tiles[sample]]
            if model_case.meta["tiles_per_sample"][sample]
            else None
        )
        found = model.generate(pixels, ids, torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert found[0].tolist() == row["new_tokens"][PLACEHOLDER:]


@torch.no_grad()
def test_packed_row(packed_case):
    """Upstream needed flash-attn and replaced attention classes; here restarting positions without a mask suffice."""
    model, expected, batch = (
        packed_case.model(),
        packed_case.read("packed_expected.safetensors"),
        packed_case.packed_batch,
    )
    output = model(**batch)
    ends = packed_case.read("packed_inputs.safetensors")["attention_mask"][0, 1:] - 1
    if "logits" in expected:
        real = slice(0, ends[-2] + 1)  # after it comes padding
        close(output.logits[:, real], expected["logits"][:, real])
    else:
        close(output.logits[0, ends[:-1]], expected["logits_at_segment_ends"][:-1])
    close(output.loss, expected["loss"][0], atol=1e-5)
    weights = packed_case.read("packed_inputs.safetensors")
    for kind in ("token", "sample", "square"):
        close(model(**batch, loss_weight=weights[f"loss_weight_{kind}"]).loss, expected[f"loss_{kind}"][0], atol=1e-5)


@torch.no_grad()
def test_packed_weights(packed_case):
    """Weights of documents from labels and positions are the recorded ones, and so is the loss without giving them."""
    batch, recorded = packed_case.packed_batch, packed_case.read("packed_inputs.safetensors")
    expected = packed_case.read("packed_expected.safetensors")
    for reduction in REDUCTIONS:
        weights = document_weights(batch["labels"], batch["position_ids"], reduction)
        torch.testing.assert_close(weights, recorded[f"loss_weight_{reduction}"].float(), atol=1e-7, rtol=1e-6)
        model = packed_case.model()
        model.loss_reduction = reduction
        close(model(**batch).loss[None], expected[f"loss_{reduction}"], atol=1e-5)


@torch.no_grad()
def test_bounds_in_place_of_a_mask(packed_case):
    """Upstream's packed batches carry where documents begin as `attention_mask`."""
    model, batch = packed_case.model(), packed_case.packed_batch
    bounds = packed_case.read("packed_inputs.safetensors")["attention_mask"]
    assert bounds.dtype == torch.int32 and bounds.shape[1] < batch["input_ids"].shape[1]
    assert torch.equal(model(**batch, attention_mask=bounds).logits, model(**batch).logits)


def test_packed_gradients(packed_case):
    model, golden = packed_case.model().train(), packed_case.read("packed.json")
    weight = packed_case.read("packed_inputs.safetensors")["loss_weight_square"]
    model(**packed_case.packed_batch, loss_weight=weight).loss.backward()
    check_norms(gradient_norms(model), golden["grad_norms"])


@torch.no_grad()
def test_pixel_shuffle(model_case):
    found = model_case.model().pixel_shuffle(model_case.expected["pixel_shuffle_in"])
    torch.testing.assert_close(found, model_case.expected["pixel_shuffle_out"], atol=0, rtol=0)


@torch.no_grad()
def test_position_embeddings(model_case):
    if "pos_resize" not in model_case.meta:
        pytest.skip("not recorded for this model")
    sizes, expected = model_case.meta["pos_resize"], model_case.expected
    model, pixels = model_case.model(), model_case.inputs["pixel_values"][:1]
    height, width = pixels.shape[2:]
    off_size = F.interpolate(pixels, size=(height + 28, width), mode="nearest")
    close(model.vision_model(off_size).last_hidden_state, expected["vision_offsize_last_hidden_state"])
    model.vision_model.resize_pos_embeddings(sizes["old_size"], sizes["new_size"], sizes["patch_size"])
    close(model.vision_model.embeddings.position_embedding, expected["pos_resized"])
    assert model.vision_model.embeddings.image_size == sizes["new_size"]


@torch.no_grad()
def test_skipping_the_resize_at_the_same_size_changes_nothing(model_case):
    """Upstream interpolates in every call; at the native size that is the identity, to the bit."""
    from internvl.model.internvl_chat.modeling_intern_vit import _resized

    embeddings = model_case.model().vision_model.embeddings
    side = embeddings.image_size // embeddings.patch_size
    assert torch.equal(_resized(embeddings.position_embedding, side, (side, side)), embeddings.position_embedding)


@torch.no_grad()
def test_rope_scaling(model_case):
    """Ours computes the base afresh in each call. Upstream's dynamic NTK keeps the base that a long input enlarged
    (`rope_short_logits_after_long`), so that an answer depends on what was asked before: not reproduced."""
    if "rope" not in model_case.meta:
        pytest.skip("not recorded for this model")
    llm, expected = model_case.model().language_model, model_case.expected
    for name, golden in (("short", "short_logits_fresh"), ("long", "long_logits"), ("short", "short_logits_fresh")):
        logits = llm(input_ids=expected[f"rope_{name}_ids"], use_cache=False).logits[:, -6:]
        close(logits, expected[f"rope_{golden}"])


def test_edge_cases(model_case):
    """Where upstream went on with a wrong batch, ours says what is wrong with it."""
    model, batch, expected = model_case.model(), dict(model_case.batch), model_case.expected
    if "edge" not in model_case.meta:
        pytest.skip("not recorded for this model")
    edge, tokens = model_case.meta["edge"], model.num_image_token
    image_tokens = int((batch["input_ids"] == model.img_context_token_id).sum())
    flags = batch["image_flags"]

    # Upstream: one feature too many gives a warning and a loss times 0.
    with pytest.raises(ValueError, match=f"{image_tokens} image tokens .* {image_tokens + tokens} visual tokens"):
        model(**{**batch, "image_flags": torch.ones_like(flags)})
    # Upstream: one too few is a RuntimeError about shapes.
    assert edge["too_few_features_error"]
    with pytest.raises(ValueError, match=f"{image_tokens} image tokens .* {image_tokens - tokens} visual tokens"):
        model(**{**batch, "image_flags": flags.clone().index_fill_(0, torch.tensor([0]), 0)})
    # Upstream: all labels masked give NaN.
    nothing = torch.full_like(batch["labels"], -100)
    for mode in (model.train(), model.eval()):
        loss = mode(**{**batch, "labels": nothing}).loss
        loss.backward()
        assert loss.item() == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())

    with torch.no_grad():
        plain = model(**batch)
        assert torch.equal(model(**{**batch, "image_flags": flags[:, None]}).logits, plain.logits)
        assert model(**{**batch, "labels": None}).loss is None
        assert torch.equal(model(**batch, return_dict=False)[1], plain.logits)  # upstream: AttributeError
        only_text = {k: batch[k][1:2] for k in ("input_ids", "labels")}
        length = int(batch["attention_mask"][1].sum())
        only_text = {k: v[:, :length] for k, v in only_text.items()}
        first = model_case.meta["tiles_per_sample"][0]
        tile = {
            "pixel_values": batch["pixel_values"][first : first + 1],
            "image_flags": torch.zeros(1, dtype=torch.long),
        }
        for extra in (tile, {}):
            output = model(**only_text, **extra)
            close(output.logits[:, -1], expected["edge_text_only_logits_last"])
            close(output.loss, expected["edge_text_only_loss"][0], atol=1e-5)
    model.img_context_token_id = None
    with pytest.raises(ValueError, match="img_context_token_id"):
        model(**batch)
