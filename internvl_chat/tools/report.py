"""Write the report of a run: one HTML page, also of a run in progress.

    internvl report OUTPUT_DIR [--output FILE] [--base DIR]

The page shows the state of the run, evaluations, curves of the training, evaluation samples with their answers before
and after, what was trainable, and the settings. It is one file, without scripts, and needs no network. Files that are
damaged are named on the page. Writing again replaces the page.
"""

import os
from pathlib import Path

from internvl.command_line import exit_on_user_error
from internvl.evaluation.results import PREDICTIONS_FILE
from internvl.regular_files import open_regular_file
from internvl.tool_parser import ToolParser
from internvl.tools.report_page.page import GENERATOR, render_page
from internvl.tools.report_page.run_files import read_run

REPORT_FILE = "report.html"


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="the --output_dir of a run")
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"default: OUTPUT_DIR/{REPORT_FILE}")
    parser.add_argument(
        "--base",
        metavar="DIR",
        type=Path,
        help="folder with predictions.jsonl of the model before training, of `internvl evaluate`; default: the "
        "first evaluation of the run",
    )
    args = parser.parse_args(argv)
    if args.base and not (args.base / PREDICTIONS_FILE).is_file():
        raise ValueError(f"--base {args.base} has no {PREDICTIONS_FILE}: expected the results of `internvl evaluate`.")
    write_page(args.output or args.folder / REPORT_FILE, render_page(read_run(args.folder), args.base))


def write_page(file: Path, page: str) -> None:
    """Write a page, complete or not at all.

    Raises:
        ValueError: the file exists and is not a report, or its folder does not exist.
    """
    if file.is_dir():
        raise ValueError(f"--output {file} is a folder: expected a file such as {file / REPORT_FILE}.")
    if not file.parent.is_dir():
        raise ValueError(f"--output {file}: the folder {file.parent} does not exist.")
    if file.exists():
        with open_regular_file(file) as opened:
            if GENERATOR.encode() not in opened.read(1024):
                raise ValueError(f"--output {file} exists and is not a report: choose another file.")
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(page, encoding="utf-8", errors="replace")  # texts may have lone surrogates
    os.replace(unfinished, file)
    print(f"Report: {file} ({len(page) / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
