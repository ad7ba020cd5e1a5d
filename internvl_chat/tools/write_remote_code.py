"""Write code files into a chat checkpoint that has none.

    internvl convert remote-code MODEL

With them stock transformers (`trust_remote_code=True`) and servers load the folder. Other tools write them with
`--with_remote_code`. A model card that a tool wrote is adapted.
"""

from internvl.command_line import CHAT_MODEL_TYPE, exit_on_user_error, require_checkpoint_dir
from internvl.model.adapter_io import require_no_adapters
from internvl.model.auxiliary_files import describe_ignored_by_engines
from internvl.model.code_files import write_remote_code
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.model_card import update_model_card
from internvl.regular_files import read_json_object
from internvl.tool_parser import ToolParser


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("model_path", help="chat checkpoint without adapters")
    args = parser.parse_args(argv)

    folder = require_checkpoint_dir(args.model_path, CHAT_MODEL_TYPE)
    config = InternVLChatConfig.from_pretrained(folder)
    require_no_adapters(config, folder)
    ignored_note = describe_ignored_by_engines(config, folder)
    old_fields = read_json_object(folder / "config.json")
    write_remote_code(folder)
    update_model_card(folder, old_fields, read_json_object(folder / "config.json"))
    print(f"Code files: {', '.join(sorted(file.name for file in folder.glob('*.py')))}")
    if ignored_note:
        print(f"Note: {ignored_note}")


if __name__ == "__main__":
    main()
