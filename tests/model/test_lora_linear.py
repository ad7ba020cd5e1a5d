"""`LoraLinear` equals PEFT's layer, and its dropout equals `nn.Dropout`."""

import copy
import json

import pytest
import torch
from helpers.lora_models import add_lora, get_adapters, randomize_adapters
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn

from internvl.model import lora
from internvl.model.lora import LoraSettings, LoraTargets
from internvl.model.lora_dropout import apply_dropout
from internvl.model.lora_linear import LoraLinear

LAYER_NAMES = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class FixedMaskDropout(nn.Dropout):
    """A dropout with one mask for each input width.

    PEFT's layers then share a mask as `LoraLinear` does.
    """

    def forward(self, x):
        generator = torch.Generator().manual_seed(x.shape[-1])
        return x * (torch.rand(x.numel(), generator=generator).view(x.shape) > self.p) / (1 - self.p)


@pytest.fixture
def build_with_peft(monkeypatch):
    """Return a function that builds a model with PEFT's own layers."""

    def build(build_fn, *args, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(lora, "register_lora_linear", lambda config: None)
            model = build_fn(*args, **settings)
        assert not find_lora_linears(model)
        return model

    return build


def find_lora_linears(model) -> list[LoraLinear]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLinear)]


def compute_results(model, batch) -> dict[str, torch.Tensor]:
    output = model.train()(**batch)
    output.loss.backward()
    return {"loss": output.loss, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-6):
    """Compare tensors by name, relative to the largest element of each."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        allowed = tolerance * max(1.0, tensor.abs().max().item())
        torch.testing.assert_close(actual[name].float(), tensor.float(), atol=allowed, rtol=0, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_equal_pefts(model_case, build_with_peft, dropout):
    results = []
    for build in (add_lora, lambda *args, **settings: build_with_peft(add_lora, *args, **settings)):
        model = randomize_adapters(build(model_case.model(), "both", dropout=dropout))
        for layer in (module for module in model.modules() if isinstance(module, Linear) and dropout):
            layer.lora_dropout["default"] = FixedMaskDropout(dropout)
        results.append(compute_results(model, model_case.batch))
    assert_same(*results)


class Decoder(nn.Module):
    """Attention and MLP with the layer names of most LLMs, otherwise minimal."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.attention, self.mlp = Attention(width), Mlp(width)

    def forward(self, x):
        return self.mlp(self.attention(x))


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        for name in LAYER_NAMES["attention"]:
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


def build_decoder(dropout: float = 0.0, variant: str = "lora", **settings) -> PeftModel:
    torch.manual_seed(0)
    targets = LoraTargets([name for names in LAYER_NAMES.values() for name in names])
    settings = LoraSettings(r=3, alpha=5, dropout=dropout, variant=variant, **settings)
    return randomize_adapters(lora.add_adapters(Decoder(), settings, targets))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)


def run(model, x) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    return {"output": output, "x": x.grad, **{n: p.grad for n, p in get_adapters(model).items()}}


@pytest.mark.parametrize("variant", lora.LORA_VARIANTS)
def test_every_variant_equals_pefts_and_its_merged_weights(build_with_peft, x, variant, tmp_path):
    ours, theirs = build_decoder(variant=variant), build_with_peft(build_decoder, variant=variant)
    assert len(find_lora_linears(ours)) == 7
    expected = run(theirs, x)
    assert_same(run(ours, x), expected)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder)
    ours_config, theirs_config = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")
    )
    for config in (ours_config, theirs_config):
        config["target_modules"] = set(config["target_modules"])
    assert ours_config == theirs_config
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(0)
    reloaded = PeftModel.from_pretrained(Decoder(), tmp_path / "ours")
    torch.testing.assert_close(reloaded(x), expected["output"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.merge_and_unload()(x), expected["output"], atol=1e-5, rtol=1e-5)


def test_other_adapter_states_equal_pefts(build_with_peft, x):
    """Disabled, another adapter, two adapters at once, merged."""
    results = []
    for build in (build_decoder, lambda: build_with_peft(build_decoder)):
        model, outputs = build(), {}
        with model.disable_adapter():
            outputs["disabled"] = model(x)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        randomize_adapters(model)
        model.set_adapter("other")
        outputs["other"] = model(x)
        model.base_model.set_adapter(["default", "other"])
        outputs["two"] = model(x)
        model.merge_adapter()
        outputs["merged"] = model(x)
        results.append(outputs)
    assert_same(*results, 1e-5)


def test_only_nn_linear_becomes_lora_linear():
    quantized = type("QuantizedLinear", (nn.Linear,), {})
    base = nn.Sequential(quantized(4, 4), nn.Linear(4, 4))
    model = lora.add_adapters(base, LoraSettings(r=2, alpha=4), LoraTargets(["0", "1"]))
    assert [type(layer) for layer in model.modules() if isinstance(layer, Linear)] == [Linear, LoraLinear]


def test_modules_with_hooks_are_called(x):
    """ZeRO-3 gathers a weight when its module is called."""
    plain, hooked, called = build_decoder(), build_decoder(), set()
    for name, module in hooked.named_modules():
        if name.endswith("default"):
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    assert_same(run(hooked, x), run(plain, x))
    assert len([name for name in called if ".lora_A." in name or ".lora_B." in name]) == 14


def test_layers_with_the_same_input_share_one_dropout_mask(x):
    model, inputs = build_decoder(dropout=0.5).train(), {}
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            layer = name.split(".")[-3]
            module.register_forward_pre_hook(lambda _, args, layer=layer: inputs.__setitem__(layer, args[0]))
    model(x)
    assert inputs["q_proj"] is inputs["k_proj"] is inputs["v_proj"] and inputs["gate_proj"] is inputs["up_proj"]
    assert len({id(read) for read in inputs.values()}) == 4
    assert 0 < (inputs["q_proj"] == 0).sum() < x.numel()


class WrapInput(torch.autograd.Function):
    """The identity function; ZeRO-3 applies a similar one to each module's input."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_wrapped_inputs_share_one_dropout_mask_too(x):
    """Otherwise ZeRO-3 would have another loss than the other stages."""
    results = []
    for is_wrapped in (False, True):
        model = build_decoder(dropout=0.5).train()
        for layer in find_lora_linears(model):
            if is_wrapped:
                layer.register_forward_pre_hook(lambda _, args: WrapInput.apply(*args))
        torch.manual_seed(1)
        results.append(run(model, x))
    assert_same(*results)


def test_the_cached_input_is_cleared(x):
    """Check it after forward, recomputation and an error.

    A deep copy of the model has its own cache.
    """
    model = build_decoder(dropout=0.5).train()
    shared_inputs = {
        id(layer.shared_input): layer.shared_input for layer in find_lora_linears(model) if layer.shared_input
    }
    assert len(shared_inputs) == 2
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(shared_input.cached is None for shared_input in shared_inputs.values())
    with pytest.raises(RuntimeError):
        model(x[..., :5])
    assert all(shared_input.cached is None for shared_input in shared_inputs.values())
    copied = copy.deepcopy(model)
    parents = {id(module) for module in copied.modules()}
    assert all(id(layer.shared_input.parent) in parents for layer in find_lora_linears(copied) if layer.shared_input)
    copied.eval()
    assert torch.equal(copied(x), copied(x)) and not torch.equal(model(x), model(x))


@pytest.mark.parametrize("parts", ["vision", "llm"])
def test_recomputation_draws_the_same_dropout_masks(model_case, parts):
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = randomize_adapters(add_lora(model_case.model(), parts, dropout=0.5))
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        results.append(compute_results(model, model_case.batch))
    assert_same(*results, 0.0)


@torch.no_grad()
def test_the_mean_over_dropout_masks_is_the_output_without_dropout(x):
    settings = LoraSettings(r=3, alpha=60, dropout=0.3)
    model = randomize_adapters(lora.add_adapters(nn.Sequential(nn.Linear(12, 7)), settings, LoraTargets(["0"])))
    expected = model.eval()(x)
    model.train()
    outputs = torch.stack([model(x) for _ in range(4000)])
    error = outputs.std(0) / len(outputs) ** 0.5
    assert error.min() > 1e-4
    assert ((outputs.mean(0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.25, 0.5])
def test_sparse_dropout_equals_dropout(rate):
    """Compare rate, scale and gradient; neighboring elements are independent."""
    x = torch.ones(1001, 333, requires_grad=True)
    torch.manual_seed(0)
    dropped = apply_dropout(x, nn.Dropout(rate))
    is_zero = (dropped == 0).double()
    std = (rate * (1 - rate) / x.numel()) ** 0.5
    assert is_zero.mean().item() == pytest.approx(rate, abs=5 * std)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / (1 - rate)]), rtol=2e-5 / (1 - rate), atol=0)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    flat = (is_zero - is_zero.mean()).flatten()
    for distance in (1, 2, 3, 4, 8, 333):
        correlation = (flat[distance:] * flat[:-distance]).mean() / (rate * (1 - rate))
        assert abs(correlation) < 5 / x.numel() ** 0.5, distance
    assert abs(is_zero[0].mean() - is_zero[-1].mean()) < 10 * (rate * (1 - rate) / 333) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(apply_dropout(x, nn.Dropout(rate)), dropped)
    assert apply_dropout(x, nn.Dropout(rate).eval()) is x and apply_dropout(x, nn.Dropout(0.0)) is x


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_equals_pefts_without_a_copy_in_float32(build_with_peft, x, base):
    results, input_dtypes = [], []
    for build in (build_decoder, lambda: build_with_peft(build_decoder)):
        model = build()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else base)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(model, x.to(base)))
            for module in (module for name, module in model.named_modules() if name.endswith("lora_A.default")):
                module.register_forward_pre_hook(lambda _, args: input_dtypes.append(args[0].dtype))
            model(x.to(base))
    assert {result["output"].dtype for result in results} == {torch.bfloat16}
    assert_same(*results, 2**-6)
    assert set(input_dtypes[:7]) == {torch.bfloat16} and set(input_dtypes[7:]) == {torch.float32}


@pytest.mark.compile
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_into_one_graph(x, dropout):
    model = build_decoder(dropout=dropout).train()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    if dropout:
        assert not torch.equal(compiled(x), compiled(x))
    else:
        torch.testing.assert_close(compiled(x), model(x))
