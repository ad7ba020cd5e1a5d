"""Writing a chat checkpoint's own code files, for `--with_remote_code`.

With them stock transformers loads the folder by `trust_remote_code=True`, and servers accept it. They are modules of
this package, with relative imports: those in `remote_code`, which nothing here imports, the templates and `chat`.
"""

import argparse
import re
from importlib.resources import files
from pathlib import Path

from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer
from internvl.model.model_card import find_repository
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.model.tokenizers.v4_compat import convert_merges_to_v4, update_json
from internvl.regular_files import read_json_object

CODE_FILES = [
    *(f"model/remote_code/configuration_{name}.py" for name in ("intern_vit", "internlm2", "internvl_chat")),
    *(f"model/remote_code/modeling_{name}.py" for name in ("intern_vit", "internlm2", "internvl_chat")),
    "model/internvl_chat/chat.py",
    "conversation.py",
]
PACKAGE_IMPORT = re.compile(r"^from internvl\.(?:\w+\.)*(\w+) import", re.MULTILINE)
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}


def add_remote_code_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--with_remote_code` to a tool that writes a chat checkpoint."""
    parser.add_argument(
        "--with_remote_code",
        action="store_true",
        help="write code files, with which stock transformers (trust_remote_code=True) and servers load the result, "
        "unless they are in the source's folder",
    )


def write_remote_code(folder: str | Path) -> None:
    """Write code files and `auto_map` into a chat checkpoint, unless it has its own.

    Files of the same names are replaced if `auto_map` does not name them. An `auto_map` that names code in a repository
    on the hub is replaced.
    """
    folder = Path(folder)
    code = find_remote_code(folder)
    if code and not any(map(find_repository, code)):
        print(f"Note: no code files are written: {folder} has its own ({', '.join(code)})")
        return
    for name in CODE_FILES:
        text = files("internvl").joinpath(name).read_text(encoding="utf-8")
        (folder / Path(name).name).write_text(PACKAGE_IMPORT.sub(r"from .\1 import", text), encoding="utf-8")
    update_json(folder / "config.json", auto_map=AUTO_MAP)
    replace_tokenizer_code(folder)


def find_remote_code(folder: Path) -> list[str]:
    """List the classes of configuration and model that `auto_map` names, if their code is available."""
    auto_map = read_json_object(folder / "config.json").get("auto_map")
    references = [str(auto_map.get(key)) for key in ("AutoConfig", "AutoModel")] if isinstance(auto_map, dict) else []
    is_available = (find_repository(name) or (folder / f"{name.partition('.')[0]}.py").is_file() for name in references)
    return references if all(is_available) else []


def replace_tokenizer_code(folder: Path) -> None:
    """Save the tokenizer of InternLM2 for a class of transformers, if its code is missing.

    Ids are the same. In decoded text, the spaces around special tokens are missing.
    """
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, InternLM2Tokenizer) and not (folder / "tokenization_internlm2.py").is_file():
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        convert_merges_to_v4(folder / "tokenizer.json")
        update_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", auto_map=None)
