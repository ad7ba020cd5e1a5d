"""Write the tables of flags into docs/configuration.md.

    source shell/setup.sh && python docs/make_flag_tables.py

Names, defaults and descriptions are those of the dataclasses in `internvl/arguments/`, topics those of `topics.py`.
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from internvl.arguments.topics import TOPICS

PAGE = Path(__file__).parent / "configuration.md"


def read_flags() -> dict[str, tuple[object, str]]:
    """Read default and description of every flag that the package declares."""
    from internvl.arguments.preference import PREFERENCE_ARGUMENTS

    flags = {}
    for declaring_class in {base for cls in PREFERENCE_ARGUMENTS for base in cls.__mro__}:
        if declaring_class.__module__.startswith("internvl."):
            own = vars(declaring_class).get("__annotations__", {})
            for field in fields(declaring_class):
                if field.name in own:
                    flags[field.name] = (field.default, field.metadata["help"])
    return flags


def format_default(name: str, default: object) -> str:
    if name == "use_cpu":
        return "without CUDA"  # the default depends on the machine
    if default is None or default is MISSING:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def format_flags(names: list[str], flags: dict[str, tuple[object, str]]) -> str:
    """Format a table of flags."""
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for name in names:
        default, description = flags[name]
        # Where None stands for something else, the description names it.
        meaning_of_none = ""
        if default is None:
            description, _, meaning_of_none = description.partition("; default: ")
        shown = escape(meaning_of_none) or format_default(name, default)
        lines.append(f"| `--{name}` | {shown} | {escape(description)} |")
    return "\n".join(lines)


def format_unsupported() -> str:
    """Format a table of transformers' flags that are not supported."""
    from internvl.arguments.unsupported_flags import REMOVED_FLAGS, UNSUPPORTED

    rows = [(name, reason) for name, reason in UNSUPPORTED.items()]
    rows += [(name, f"removed in transformers 5: {advice}") for name, advice in REMOVED_FLAGS.items()]
    lines = ["| flag | reason, or what to use |", "| --- | --- |"]
    return "\n".join(lines + [f"| `--{name}` | {escape(reason)} |" for name, reason in sorted(rows)])


def escape(text: str) -> str:
    """Escape Markdown and mark flags as code."""
    text = text.replace("|", "\\|").replace("<", "\\<").replace("*.", "\\*.")
    return re.sub(r"--\w+( True| False| [\w.]+\.json)?", r"`\g<0>`", text)


def fill_tables(page: str) -> str:
    """Replace the tables between `<!-- flags: TOPIC -->` and `<!-- end -->`."""
    flags = read_flags()
    tables = {topic: format_flags(names.split(), flags) for topic, names in TOPICS.items()}
    tables["unsupported"] = format_unsupported()
    return re.sub(
        r"(<!-- flags: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(fill_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
