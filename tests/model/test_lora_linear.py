"""Our LoRA layer is PEFT's in everything but cost: outputs, gradients, files; and its masks keep the update's mean."""

import copy
import json

import pytest
import torch
from model.test_lora_laws import adapters, disturb, wrap
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn

from internvl.model import lora
from internvl.model.lora import LoraSettings, LoraTargets
from internvl.model.lora_dropout import drop
from internvl.model.lora_linear import LoraLinear

PROJECTIONS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class SameMask(nn.Dropout):
    """Draws one mask for each width of input, so that PEFT's layers share it as ours do."""

    def forward(self, x):
        generator = torch.Generator().manual_seed(x.shape[-1])
        return x * (torch.rand(x.numel(), generator=generator).view(x.shape) > self.p) / (1 - self.p)


@pytest.fixture
def by_peft(monkeypatch):
    """Wraps as `add_adapters`, with PEFT's own layers."""

    def make(wrapping, *args, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(lora, "ask_for", lambda config: None)
            model = wrapping(*args, **settings)
        assert not [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
        return model

    return make


def layers(model) -> list[LoraLinear]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLinear)]


def results(model, batch) -> dict[str, torch.Tensor]:
    output = model.train()(**batch)
    output.loss.backward()
    return {"loss": output.loss, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict, expected: dict, tolerance: float = 1e-6):
    """Relative to the largest element of each tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        allowed = tolerance * max(1.0, tensor.abs().max().item())
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=allowed, rtol=0, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_pefts(model_case, by_peft, dropout):
    found = []
    for make in (wrap, lambda *args, **settings: by_peft(wrap, *args, **settings)):
        model = disturb(make(model_case.model(), "both", dropout=dropout))
        for layer in (module for module in model.modules() if isinstance(module, Linear) and dropout):
            layer.lora_dropout["default"] = SameMask(dropout)
        found.append(results(model, model_case.batch))
    assert_same(*found)


class Decoder(nn.Module):
    """Attention and MLP by the names most decoders use, the nonlinear parts as small as can be."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.attention, self.mlp = Attention(width), Mlp(width)

    def forward(self, x):
        return self.mlp(self.attention(x))


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        for name in PROJECTIONS["attention"]:
            setattr(self, name, nn.Linear(width, width, bias=name != "o_proj"))

    def forward(self, x):
        return self.o_proj(self.q_proj(x) * self.k_proj(x).tanh() + self.v_proj(x))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


def decoder(dropout: float = 0.0, variant: str = "lora", **settings) -> PeftModel:
    torch.manual_seed(0)
    targets = LoraTargets([name for names in PROJECTIONS.values() for name in names])
    settings = LoraSettings(r=3, alpha=5, dropout=dropout, variant=variant, **settings)
    return disturb(lora.add_adapters(Decoder(), settings, targets))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)


def run(model, x) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    return {"output": output, "x": x.grad, **{n: p.grad for n, p in adapters(model).items()}}


@pytest.mark.parametrize("variant", lora.VARIANTS)
def test_every_variant_equals_pefts_and_its_own_merge(by_peft, x, variant, tmp_path):
    ours, theirs = decoder(variant=variant), by_peft(decoder, variant=variant)
    assert len(layers(ours)) == 7
    expected = run(theirs, x)
    assert_same(run(ours, x), expected)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder)
    own, peft = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    own["target_modules"], peft["target_modules"] = set(own["target_modules"]), set(peft["target_modules"])
    assert own == peft
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(0)
    reopened = PeftModel.from_pretrained(Decoder(), tmp_path / "ours")
    torch.testing.assert_close(reopened(x), expected["output"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.merge_and_unload()(x), expected["output"], atol=1e-5, rtol=1e-5)


def test_other_states_are_left_to_peft(by_peft, x):
    """Disabled, merged, a second adapter alone and two at once."""
    found = []
    for make in (decoder, lambda: by_peft(decoder)):
        model, outputs = make(), {}
        with model.disable_adapter():
            outputs["disabled"] = model(x)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        disturb(model)
        model.set_adapter("other")
        outputs["other"] = model(x)
        model.base_model.set_adapter(["default", "other"])
        outputs["two"] = model(x)
        model.merge_adapter()
        outputs["merged"] = model(x)
        found.append(outputs)
    assert_same(*found, 1e-5)


def test_only_plain_linear_layers_get_it():
    quantised = type("Quantised", (nn.Linear,), {})
    base = nn.Sequential(quantised(4, 4), nn.Linear(4, 4))
    model = lora.add_adapters(base, LoraSettings(r=2, alpha=4), LoraTargets(["0", "1"]))
    assert [type(layer) for layer in model.modules() if isinstance(layer, Linear)] == [Linear, LoraLinear]


def test_modules_with_hooks_are_called_and_numbers_stay(x):
    """As DeepSpeed's ZeRO-3 needs it: its hooks gather what a module holds, and would find nothing to gather."""
    plain, hooked, seen = decoder(), decoder(), set()
    for name, module in hooked.named_modules():
        if name.endswith("default"):
            module.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
    assert_same(run(hooked, x), run(plain, x))
    assert len([name for name in seen if ".lora_A." in name or ".lora_B." in name]) == 14


def test_layers_that_read_the_same_input_share_one_mask(x):
    model, inputs = decoder(dropout=0.5).train(), {}
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            place = name.split(".")[-3]
            module.register_forward_pre_hook(lambda _, args, place=place: inputs.__setitem__(place, args[0]))
    model(x)
    assert inputs["q_proj"] is inputs["k_proj"] is inputs["v_proj"] and inputs["gate_proj"] is inputs["up_proj"]
    assert len({id(read) for read in inputs.values()}) == 4
    assert 0 < (inputs["q_proj"] == 0).sum() < x.numel()


class Wrap(torch.autograd.Function):
    """As DeepSpeed's ZeRO-3 wraps what each module reads, to notice when its gradient is there."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_wrap_around_the_input_changes_nothing(x):
    """The masks are the same, and so are losses under every stage of ZeRO."""
    found = []
    for wrapped in (False, True):
        model = decoder(dropout=0.5).train()
        for layer in layers(model):
            if wrapped:
                layer.register_forward_pre_hook(lambda _, args: Wrap.apply(*args))
        torch.manual_seed(1)
        found.append(run(model, x))
    assert_same(*found)


def test_what_was_shared_is_given_back(x):
    """After forward, after recomputation, and after an error; a copy shares its own; nothing is left of it in eval."""
    model = decoder(dropout=0.5).train()
    shared = {id(layer.shared): layer.shared for layer in layers(model) if layer.shared}
    assert len(shared) == 2
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(each.kept is None for each in shared.values())
    with pytest.raises(RuntimeError):
        model(x[..., :5])
    assert all(each.kept is None for each in shared.values())
    twin = copy.deepcopy(model)
    parents = {id(module) for module in twin.modules()}
    assert all(id(layer.shared.parent) in parents for layer in layers(twin) if layer.shared)
    twin.eval()
    assert torch.equal(twin(x), twin(x)) and not torch.equal(model(x), model(x))


@pytest.mark.parametrize("parts", ["vision", "llm"])
def test_recomputation_draws_the_same_masks(model_case, parts):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = disturb(wrap(model_case.model(), parts, dropout=0.5))
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        found.append(results(model, model_case.batch))
    assert_same(*found, 0.0)


@torch.no_grad()
def test_the_mean_over_masks_is_the_update(x):
    settings = LoraSettings(r=3, alpha=60, dropout=0.3)
    model = disturb(lora.add_adapters(nn.Sequential(nn.Linear(12, 7)), settings, LoraTargets(["0"])))
    expected = model.eval()(x)
    model.train()
    outputs = torch.stack([model(x) for _ in range(4000)])
    error = outputs.std(0) / len(outputs) ** 0.5
    assert error.min() > 1e-4
    assert ((outputs.mean(0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.25, 0.5])
def test_a_mask_is_dropouts(rate):
    """Its rate, its scale, its gradient; neighbours are independent."""
    x = torch.ones(1001, 333, requires_grad=True)
    torch.manual_seed(0)
    dropped = drop(x, nn.Dropout(rate))
    zero = (dropped == 0).double()
    deviation = (rate * (1 - rate) / x.numel()) ** 0.5
    assert zero.mean().item() == pytest.approx(rate, abs=5 * deviation)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / (1 - rate)]), rtol=2e-5 / (1 - rate), atol=0)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    flat = (zero - zero.mean()).flatten()
    for distance in (1, 2, 3, 4, 8, 333):
        correlation = (flat[distance:] * flat[:-distance]).mean() / (rate * (1 - rate))
        assert abs(correlation) < 5 / x.numel() ** 0.5, distance
    assert abs(zero[0].mean() - zero[-1].mean()) < 10 * (rate * (1 - rate) / 333) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(drop(x, nn.Dropout(rate)), dropped)
    assert drop(x, nn.Dropout(rate).eval()) is x and drop(x, nn.Dropout(0.0)) is x


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_numbers_are_pefts_without_a_copy_in_fp32(by_peft, x, base):
    found, inputs = [], []
    for make in (decoder, lambda: by_peft(decoder)):
        model = make()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else base)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(model, x.to(base)))
            for module in (module for name, module in model.named_modules() if name.endswith("lora_A.default")):
                module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
            model(x.to(base))
    assert {each["output"].dtype for each in found} == {torch.bfloat16}
    assert_same(*found, 2**-6)
    assert set(inputs[:7]) == {torch.bfloat16} and set(inputs[7:]) == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_into_one_graph(x, dropout):
    model = decoder(dropout=dropout).train()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    if dropout:
        assert not torch.equal(compiled(x), compiled(x))
    else:
        torch.testing.assert_close(compiled(x), model(x))
