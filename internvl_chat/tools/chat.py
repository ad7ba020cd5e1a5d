"""Ask a chat model from the terminal, or answer all questions of a file.

    internvl chat FOLDER                                         a session: several questions
    internvl chat FOLDER "What is it?" --image a.png             one question; it may also come from a pipe
    internvl chat FOLDER --input data.jsonl --output out.jsonl   all records; also under torchrun

FOLDER is a base checkpoint, the output or a checkpoint of a run, or a merged checkpoint; images are tiled as that run
did. In a session, /image PATH and /video PATH attach something to the next question, /reset forgets everything, /exit
or Ctrl-D ends the session, Ctrl-C ends an answer. --input takes an annotation file, whose images are relative to its
folder, or a meta file (.json). The last question of each record is answered; --output gets annotation lines with the
answers. Run the same command again to continue after an interruption. Exit status: 1 if a record is unusable, else 0.
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TextStreamer

from internvl.arguments.data import DataTrainingArguments
from internvl.command_line import exit_on_user_error
from internvl.constants import UnusableSample
from internvl.conversation import get_conv_template
from internvl.data.image_files import ImageDecoding, load_image
from internvl.data.images import build_transform, dynamic_preprocess, normalize_tiles
from internvl.data.schema import insert_placeholders
from internvl.data.videos import read_frames
from internvl.dist_utils import get_rank
from internvl.evaluation.answers import extract_final_answer
from internvl.evaluation.batch_prediction import predict_file
from internvl.evaluation.checkpoint_settings import build_data_arguments, find_chat_checkpoint, load_chat_model
from internvl.evaluation.questions import refuse_reserved_token
from internvl.evaluation.settings import EvaluationSettings
from internvl.launchers import launch_environment
from internvl.model.auxiliary_files import read_normalization
from internvl.model.internvl_chat.chat import IMAGE_PLACEHOLDER, get_end_marker, has_channels
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group
from internvl.tool_parser import ToolParser

PROMPT = "> "
HELP = """/image PATH   attach an image to the next question
/video PATH   attach frames of a video to the next question
/reset        forget the questions, answers and images so far
/help         show this text
/exit         end the session, as Ctrl-D does; Ctrl-C ends an answer
The images of a question come before its text, or where it has <image>."""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.folder = find_chat_checkpoint(args.folder)
    try:
        if int(launch_environment(os.environ)["WORLD_SIZE"]) > 1:
            exit_process_group(run_as_rank(args))
        else:
            sys.exit(answer_file(args) if args.input else answer_terminal(args))
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to continue" if args.input else 130)


def run_as_rank(args: argparse.Namespace) -> int:
    """Answer a file together with the other ranks of a launcher."""
    with abort_all_ranks_on_error():
        if not args.input:
            raise ValueError("several ranks are only supported with --input")
        join_process_group([])
        return answer_file(args)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="chat checkpoint: a folder, or ORG/NAME on the hub")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="print its answer and exit")
    parser.add_argument(
        "--image", metavar="PATH", action="append", default=[], help="of the first question; repeatable"
    )
    parser.add_argument("--video", metavar="PATH", action="append", default=[], help="of the first question")
    parser.add_argument("--input", metavar="FILE", help="annotation file (.jsonl) or meta file (.json) to answer")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSONL file of the answered records")
    parser.add_argument("--system", help="system message (default: the model's)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: 0, no sampling)")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="questions per batch of --input (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the run's)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("temperature", 0)):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"--{name} {value} is invalid: expected a number >= {least}")
    if bool(args.input) != bool(args.output):
        raise ValueError("--input and --output are required together")
    if args.input and (args.question or args.image or args.video or args.temperature):
        raise ValueError("--input does not support a question, --image, --video or --temperature: records have them")
    if args.system is not None:
        validate_text(args.system, "--system")
    if args.output and args.output.exists() and args.output.samefile(args.input):
        raise ValueError(f"--output {args.output} is the input: choose another file")
    return args


def validate_text(text: str, name: str) -> None:
    """Require text that a model can be given.

    Raises:
        UnusableSample: it has the token that stands for images, or bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python keeps such bytes of arguments and terminals as surrogates
        raise UnusableSample(f"{name} is not valid UTF-8") from error
    refuse_reserved_token(text, name)


def load_chat(args: argparse.Namespace) -> tuple[Any, Any, DataTrainingArguments]:
    """Load model, tokenizer and data flags of the folder."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if get_rank() == 0 else logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data_args = build_data_arguments(args.folder)
    model, tokenizer = load_chat_model(args.folder, args.dtype and getattr(torch, args.dtype), args.device)
    if args.system is not None:
        model.system_message = args.system
    return model, tokenizer, data_args


# -- a file ------------------------------------------------------------------------------------------------------------


def answer_file(args: argparse.Namespace) -> int:
    """Answer all questions of --input. A collective.

    Returns:
        The exit status: 1 if a record is unusable.
    """
    model, tokenizer, data_args = load_chat(args)
    mean, std = read_normalization(args.folder)
    settings = EvaluationSettings(
        max_tokens=0,  # no rows are packed
        max_tiles=0,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        num_samples=None,
        image_mean=tuple(mean),
        image_std=tuple(std),
    )
    counts = predict_file(model, tokenizer, args.input, args.output, data_args, settings)
    if get_rank() == 0:
        for sample in counts.skipped:
            print(f"Skipped: {sample}", file=sys.stderr)
        before = f" ({counts.num_answered_before} were before)" if counts.num_answered_before else ""
        print(f"{args.output}: {counts.num_answered} questions answered{before}, {len(counts.skipped)} records skipped")
    return int(bool(counts.skipped))


# -- a terminal or a pipe ----------------------------------------------------------------------------------------------


def answer_terminal(args: argparse.Namespace) -> int:
    """Answer a single question, or those of a session."""
    question = read_single_question(args.question)
    model, tokenizer, data_args = load_chat(args)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    generation_config = {"max_new_tokens": args.max_new_tokens, **sampling}
    session = ChatSession(model, tokenizer, data_args, read_normalization(args.folder), generation_config)
    for path in args.image:
        session.attach_image(path)
    for path in args.video:
        session.attach_video(path)
    if question is not None:
        print(session.ask(question, show_fn=print_piece if sys.stdout.isatty() else None))
        return 0
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and recalled
    print(f"{args.folder}: /help lists the commands")
    run_session(session)
    return 0


def read_single_question(question: str | None) -> str | None:
    """Return the question of the command line or a pipe; None in a terminal.

    Raises:
        ValueError: it is empty, or not text for a model.
    """
    if question is None and sys.stdin.isatty():
        return None
    try:
        question = (sys.stdin.read() if question is None else question).strip()
    except UnicodeDecodeError as error:
        raise ValueError("the question is not valid UTF-8") from error
    if not question:
        raise ValueError("the question is empty: pass it as an argument, or through a pipe")
    validate_text(question, "the question")
    return question


# -- a conversation ----------------------------------------------------------------------------------------------------


class ChatSession:
    """A conversation with a model about images.

    Args:
        normalization: mean and standard deviation of the colors.
    """

    def __init__(
        self,
        model,
        tokenizer,
        data_args: DataTrainingArguments,
        normalization: tuple[list[float], list[float]],
        generation_config: dict[str, Any],
    ):
        self.model, self.tokenizer, self.data_args = model, tokenizer, data_args
        self.normalization, self.generation_config = normalization, generation_config
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and its images."""
        self.history: list[tuple[str, str]] = []
        self.tiles: list[torch.Tensor] = []  # of each image or frame, (T, 3, S, S)
        self.attached_images: list[str] = []  # of the next question
        self.attached_video: list[torch.Tensor] = []  # its frames, (1, 3, S, S)

    def attach_image(self, path: str) -> None:
        """Attach an image to the next question.

        Raises:
            UnusableSample: it cannot be opened.
        """
        if self.attached_video:
            raise UnusableSample("a question about a video cannot have images, too")
        self._load_tiles(path, 1)
        self.attached_images.append(path)

    def attach_video(self, path: str) -> None:
        """Attach frames of a video to the next question, as many as in training.

        Raises:
            UnusableSample: it cannot be opened, or the question has other media.
        """
        if self.attached_images or self.attached_video:
            raise UnusableSample("a question about a video cannot have other images or videos")
        decoding = ImageDecoding.from_flags(self.data_args)
        frames = read_frames(path, self.data_args.max_num_frame, "middle", decoding=decoding)
        self.attached_video = [self._transform([frame]) for frame in frames]

    def ask(self, question: str, show_fn: Callable[[str], None] | None = None) -> str:
        """Answer a question. An interrupted answer ends where it was.

        Args:
            show_fn: called with each piece of the answer.

        Returns:
            The answer; the rest of it, "", if it was shown.
        """
        validate_text(question, "the question")
        images = self.attached_video or [
            self._load_tiles(path, len(self.attached_images)) for path in self.attached_images
        ]
        kind = "video" if self.attached_video else "image" if images else "text"
        if question.count(IMAGE_PLACEHOLDER) not in (0, len(images)) and kind == "image":
            raise UnusableSample(
                f"{question.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} for {len(images)} images: remove an "
                f"{IMAGE_PLACEHOLDER}, or add an image with --image (in a session, /image)"
            )
        [turn] = insert_placeholders([{"from": "human", "value": question}], kind, len(images))
        tiles = [*self.tiles, *images]
        streamer = AnswerStreamer(self.model, self.tokenizer, show_fn)
        try:
            answer = self.model.chat(
                self.tokenizer,
                torch.cat(tiles).to(self.model.device) if tiles else None,
                turn["value"],
                {**self.generation_config, "streamer": streamer},
                self.history,
                num_patches_list=[*map(len, tiles)],
            )
        except KeyboardInterrupt:
            streamer.end()
            answer = streamer.text.strip()
            if not answer:  # the question can be asked again
                return ""
        self.history = [*self.history, (turn["value"], answer)]
        self.tiles, self.attached_images, self.attached_video = tiles, [], []
        return "" if streamer.has_shown else extract_final_answer(self.model.template, answer)

    def _load_tiles(self, path: str, num_images: int) -> torch.Tensor:
        """Load the tiles of an image, one of several of a question."""
        args, image = self.data_args, load_image(path, ImageDecoding.from_flags(self.data_args))
        if not args.dynamic_image_size:
            return self._transform([image])
        max_tiles = max(1, args.max_dynamic_patch // num_images)
        tiling = args.min_dynamic_patch, max_tiles, args.force_image_size, args.use_thumbnail
        return self._transform(dynamic_preprocess(image, *tiling))

    def _transform(self, tiles: list) -> torch.Tensor:
        args = self.data_args
        transform = build_transform(False, args.force_image_size, args.pad2square, args.normalize_type, normalize=False)
        return normalize_tiles(torch.stack([transform(tile) for tile in tiles]), *self.normalization)


class AnswerStreamer(TextStreamer):
    """Shows an answer while it is generated, and keeps its text.

    An answer with channels is not shown: only its end is meant for the reader.
    """

    def __init__(self, model, tokenizer, show_fn: Callable[[str], None] | None):
        template = get_conv_template(model.template)
        super().__init__(tokenizer, skip_special_tokens=not has_channels(template))
        self.end_ids = {tokenizer.convert_tokens_to_ids(get_end_marker(template)), tokenizer.eos_token_id}
        self.show_fn = None if has_channels(template) else show_fn
        self.text, self.has_shown = "", False

    def put(self, value: torch.Tensor) -> None:
        """Receive the ids of the prompt, of which `chat` gives none, or of a new token."""
        if value.numel() and value.flatten()[-1].item() not in self.end_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive text that further tokens do not change."""
        self.text += text
        if self.show_fn:
            self.has_shown = True
            self.show_fn(text)


def print_piece(text: str) -> None:
    """Print a piece of an answer."""
    print(text, end="", flush=True)


def run_session(session: ChatSession, input_fn: Callable[[str], str] = input) -> None:
    """Answer questions until the session ends."""
    while True:
        try:
            line = input_fn(PROMPT).strip()
        except UnicodeDecodeError:
            print("error: the question is not valid UTF-8")
            continue
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D ends the session")
            continue
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return
        try:
            answer_line(session, line, command, os.path.expanduser(argument.strip().strip("'\"")))
        except (ValueError, OSError) as error:  # UnusableSample is a ValueError
            print(f"error: {error}")


def answer_line(session: ChatSession, line: str, command: str, argument: str) -> None:
    """Run a command, or answer a question."""
    commands = {
        "/image": lambda: session.attach_image(argument),
        "/video": lambda: session.attach_video(argument),
        "/reset": session.reset,
        "/help": lambda: print(HELP),
    }
    if command in commands:
        commands[command]()
    elif command.startswith("/") and command[1:].isalpha():
        raise ValueError(f"{command} is no command: /help lists them")
    elif line:
        print(session.ask(line, show_fn=print_piece))


if __name__ == "__main__":
    main()
