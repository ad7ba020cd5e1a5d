"""Reference cases: upstream's results from the same checkpoints."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.model_cases import assert_close, assert_norms_close, get_gradient_norms

from internvl.model.internvl_chat.documents import LOSS_REDUCTIONS, compute_label_weights
from internvl.model.internvl_chat.modeling_intern_vit import resize_position_embedding

# The recorded ids begin with a placeholder, which transformers 4 adds to ids generated from embeddings.
NUM_PLACEHOLDERS = 0 if transformers.__version__.startswith("4.") else 1


@torch.no_grad()
def test_forward_features_hidden_states_and_losses(model_case):
    model, expected, inputs = model_case.model(), model_case.expected, model_case.inputs
    assert model.num_image_token == model_case.meta["num_image_token"]
    assert sorted(model.state_dict()) == model_case.meta["state_dict_keys"]
    assert_close(model.extract_feature(inputs["pixel_values"]), expected["extract_feature"])
    vision = model.vision_model(inputs["pixel_values"], output_hidden_states=True)
    assert_close(vision.last_hidden_state, expected["vision_last_hidden_state"])
    assert len(vision.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    assert_close(vision.pooler_output, expected["vision_last_hidden_state"][:, 0])
    if "vision_selected_hidden_state" in expected:
        assert_close(vision.hidden_states[model.select_layer], expected["vision_selected_hidden_state"])

    real = inputs["attention_mask"].bool()
    output = model(**model_case.batch)
    assert_close(output.logits[real], expected["logits"][real])
    assert_close(output.loss, expected["loss"][0], atol=1e-5)
    with_positions = model(**model_case.batch, position_ids=inputs["position_ids"])
    assert_close(with_positions.logits[real], expected["logits"][real])
    for kind in ("token", "sample", "square"):
        for weight in (inputs[f"loss_weight_{kind}"], inputs[f"loss_weight_{kind}"].tolist()):
            assert_close(model(**model_case.batch, loss_weight=weight).loss, expected[f"loss_{kind}"][0], atol=1e-5)


def test_gradients_and_training_loss(model_case):
    model, golden = model_case.model().train(), model_case.read("grads.json")
    output = model(**model_case.batch)
    assert output.logits is None  # training never computes the full logits
    assert output.loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    output.loss.backward()
    assert_norms_close(get_gradient_norms(model), golden["grad_norms"])


def test_generate(model_case):
    """Greedy generation equals upstream's.

    Upstream generated all answers with one model. Where a long input permanently changes its rotary base (see
    `test_rope_scaling`), only the first answer is comparable.
    """
    model, inputs, golden = model_case.model(), model_case.inputs, model_case.read("generate.json")
    if model_case.meta.get("rope", {}).get("short_changes_after_long"):
        golden = golden[:1]
    tiles = torch.tensor(model_case.meta["tiles_per_sample"]).clamp(min=1)  # text samples have one placeholder tile
    for row in golden:
        sample = row["sample"]
        first = int(tiles[:sample].sum())
        ids = inputs["input_ids"][sample : sample + 1, : row["prompt_len"]]
        pixels = (
            inputs["pixel_values"][first : first + tiles[sample]]
            if model_case.meta["tiles_per_sample"][sample]
            else None
        )
        generated = model.generate(pixels, ids, torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert generated[0].tolist() == row["new_tokens"][NUM_PLACEHOLDERS:]


@torch.no_grad()
def test_packed_row(packed_case):
    """Upstream patches attention classes; here restarting positions suffice."""
    model, expected, batch = (
        packed_case.model(),
        packed_case.read("packed_expected.safetensors"),
        packed_case.packed_batch,
    )
    output = model(**batch)
    ends = packed_case.read("packed_inputs.safetensors")["attention_mask"][0, 1:] - 1
    if "logits" in expected:
        real = slice(0, ends[-2] + 1)  # then padding
        assert_close(output.logits[:, real], expected["logits"][:, real])
    else:
        assert_close(output.logits[0, ends[:-1]], expected["logits_at_segment_ends"][:-1])
    assert_close(output.loss, expected["loss"][0], atol=1e-5)
    weights = packed_case.read("packed_inputs.safetensors")
    for kind in ("token", "sample", "square"):
        assert_close(
            model(**batch, loss_weight=weights[f"loss_weight_{kind}"]).loss, expected[f"loss_{kind}"][0], atol=1e-5
        )


@torch.no_grad()
def test_packed_weights(packed_case):
    """Label weights computed from labels and positions equal the recorded ones."""
    batch, recorded = packed_case.packed_batch, packed_case.read("packed_inputs.safetensors")
    expected = packed_case.read("packed_expected.safetensors")
    for reduction in LOSS_REDUCTIONS:
        weights = compute_label_weights(batch["labels"], batch["position_ids"], reduction)
        torch.testing.assert_close(weights, recorded[f"loss_weight_{reduction}"].float(), atol=1e-7, rtol=1e-6)
        model = packed_case.model()
        model.loss_reduction = reduction
        assert_close(model(**batch).loss[None], expected[f"loss_{reduction}"], atol=1e-5)


@torch.no_grad()
def test_cumulative_lengths_as_attention_mask(packed_case):
    """Upstream's packed batches have cumulative document lengths (int32) as `attention_mask`."""
    model, batch = packed_case.model(), packed_case.packed_batch
    bounds = packed_case.read("packed_inputs.safetensors")["attention_mask"]
    assert bounds.dtype == torch.int32 and bounds.shape[1] < batch["input_ids"].shape[1]
    assert torch.equal(model(**batch, attention_mask=bounds).logits, model(**batch).logits)


def test_packed_gradients(packed_case):
    model, golden = packed_case.model().train(), packed_case.read("packed.json")
    weight = packed_case.read("packed_inputs.safetensors")["loss_weight_square"]
    model(**packed_case.packed_batch, loss_weight=weight).loss.backward()
    assert_norms_close(get_gradient_norms(model), golden["grad_norms"])


@torch.no_grad()
def test_pixel_shuffle(model_case):
    actual = model_case.model().pixel_shuffle(model_case.expected["pixel_shuffle_in"])
    torch.testing.assert_close(actual, model_case.expected["pixel_shuffle_out"], atol=0, rtol=0)


@torch.no_grad()
def test_position_embeddings(model_case):
    if "pos_resize" not in model_case.meta:
        pytest.skip("not recorded for this model")
    sizes, expected = model_case.meta["pos_resize"], model_case.expected
    model, pixels = model_case.model(), model_case.inputs["pixel_values"][:1]
    height, width = pixels.shape[2:]
    off_size = F.interpolate(pixels, size=(height + 28, width), mode="nearest")
    assert_close(model.vision_model(off_size).last_hidden_state, expected["vision_offsize_last_hidden_state"])
    model.vision_model.resize_pos_embeddings(sizes["old_size"], sizes["new_size"], sizes["patch_size"])
    assert_close(model.vision_model.embeddings.position_embedding, expected["pos_resized"])
    assert model.vision_model.embeddings.image_size == sizes["new_size"]


@torch.no_grad()
def test_resizing_to_the_same_size_is_the_identity(model_case):
    """Upstream always interpolates; here the native size is not resized."""
    embeddings = model_case.model().vision_model.embeddings
    side = embeddings.image_size // embeddings.patch_size
    assert torch.equal(
        resize_position_embedding(embeddings.position_embedding, side, (side, side)), embeddings.position_embedding
    )


@torch.no_grad()
def test_rope_scaling(model_case):
    """The rotary base is computed anew in each call.

    Upstream's dynamic NTK keeps the base that a long input enlarged (`rope_short_logits_after_long`): an answer depends
    on earlier inputs. This is not reproduced.
    """
    if "rope" not in model_case.meta:
        pytest.skip("not recorded for this model")
    llm, expected = model_case.model().language_model, model_case.expected
    for name, golden in (("short", "short_logits_fresh"), ("long", "long_logits"), ("short", "short_logits_fresh")):
        logits = llm(input_ids=expected[f"rope_{name}_ids"], use_cache=False).logits[:, -6:]
        assert_close(logits, expected[f"rope_{golden}"])


def test_edge_cases(model_case):
    """Invalid batches raise errors; upstream trains on some of them."""
    model, batch, expected = model_case.model(), dict(model_case.batch), model_case.expected
    if "edge" not in model_case.meta:
        pytest.skip("not recorded for this model")
    edge, tokens = model_case.meta["edge"], model.num_image_token
    image_tokens = int((batch["input_ids"] == model.img_context_token_id).sum())
    flags = batch["image_flags"]

    # One tile too many. Upstream warns and multiplies the loss by 0.
    with pytest.raises(ValueError, match=f"{image_tokens} image tokens .* {image_tokens + tokens} visual tokens"):
        model(**{**batch, "image_flags": torch.ones_like(flags)})
    indices = {"image_token_indices": torch.arange(image_tokens), "tile_indices": None}  # None: all tiles
    with pytest.raises(ValueError, match=f"{image_tokens} image tokens .* {image_tokens + tokens} visual tokens"):
        model(**batch, **indices)
    # One tile too few. Upstream raises a RuntimeError about shapes.
    assert edge["too_few_features_error"]
    with pytest.raises(ValueError, match=f"{image_tokens} image tokens .* {image_tokens - tokens} visual tokens"):
        model(**{**batch, "image_flags": flags.clone().index_fill_(0, torch.tensor([0]), 0)})
    # No labels. Upstream's loss is NaN.
    no_labels = torch.full_like(batch["labels"], -100)
    for mode in (model.train(), model.eval()):
        loss = mode(**{**batch, "labels": no_labels}).loss
        loss.backward()
        assert loss.item() == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())

    with torch.no_grad():
        plain = model(**batch)
        assert torch.equal(model(**{**batch, "image_flags": flags[:, None]}).logits, plain.logits)
        assert model(**{**batch, "labels": None}).loss is None
        assert torch.equal(model(**batch, return_dict=False)[1], plain.logits)  # upstream raises an AttributeError
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
            assert_close(output.logits[:, -1], expected["edge_text_only_logits_last"])
            assert_close(output.loss, expected["edge_text_only_loss"][0], atol=1e-5)
    model.img_context_token_id = None
    with pytest.raises(ValueError, match="img_context_token_id"):
        model(**batch)
