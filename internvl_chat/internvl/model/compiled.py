"""torch.compile for the layers of a tower, one at a time, in place: state dicts and modules keep their names.

Called by `train/towers.py`. Layers of a kind share what is compiled once; what lies between them stays as it is.
"""

from torch import nn

from internvl.model.internvl_chat.modeling_intern_vit import InternVisionEncoderLayer
from internvl.model.recompute import layers_of


def compile_layers(tower: nn.Module) -> None:
    """Compiles the layers of a vision encoder, and of a language model the parts of its layers, for inputs of any size.

    Layers of transformers checkpoint themselves, and what is computed again must be what was compiled, or dropout would
    draw other numbers the second time: so it is their attention, norms and MLP that are compiled.
    """
    for layer in layers_of(tower):
        for module in [layer] if isinstance(layer, InternVisionEncoderLayer) else layer.children():
            module.compile(dynamic=True)
