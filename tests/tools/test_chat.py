"""tools/chat.py: single questions, sessions, files; answers are those of `model.chat`."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.forked_ranks import ForkedRanks
from helpers.paths import REPO_ROOT
from helpers.samples import make_turns
from helpers.tiny_models import make_tiny_checkpoint
from PIL import Image

import internvl.tools.chat
from internvl.data.images import NORMALIZATION_STATS, build_transform, dynamic_preprocess
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.evaluation.checkpoint_settings import build_data_arguments, load_chat_model
from internvl.launchers import find_free_port
from internvl.tools.chat import ChatSession, run_session
from internvl.tools.chat import main as run_chat

PROGRAM = REPO_ROOT / "internvl_chat/tools/chat.py"
NUM_TOKENS = 6
CONFIG = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
MEAN, STD = NORMALIZATION_STATS["imagenet"]


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory) -> Path:
    """A chat checkpoint and images."""
    folder = tmp_path_factory.mktemp("chat")
    make_tiny_checkpoint(folder / "model", goldens / "tokenizer")
    noise = Image.effect_noise((90, 40), 80).convert("RGB")
    noise.save(folder / "wide.png")
    noise.resize((40, 40)).save(folder / "small.png")
    (folder / "frames").mkdir()
    for index in range(3):
        noise.save(folder / "frames" / f"frame_{index}.png")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_chat_model(folder / "model", torch.float32, "cpu")


def load_tiles(path: Path, num_images: int = 1) -> torch.Tensor:
    """Preprocess an image as upstream's examples do; the checkpoint allows 4 tiles."""
    transform = build_transform(False, 56)
    tiles = dynamic_preprocess(Image.open(path), 1, 4 // num_images, 56, True)
    return torch.stack([transform(tile) for tile in tiles])


def chat_with(loaded, images: list[torch.Tensor], question: str, history=None) -> str:
    model, tokenizer = loaded
    tiles = torch.cat(images) if images else None
    return model.chat(tokenizer, tiles, question, CONFIG, history, num_patches_list=[*map(len, images)])


def run(*argv) -> int:
    """Run the tool in this process and return its exit status."""
    with pytest.raises(SystemExit) as stopped:
        run_chat([*map(str, argv), "--max_new_tokens", str(NUM_TOKENS), "--dtype", "float32", "--device", "cpu"])
    return stopped.value.code


# -- one question ------------------------------------------------------------------------------------------------------


def test_a_question_with_images_prints_the_answer(folder, loaded, capsys):
    paths = [folder / "wide.png", folder / "small.png"]
    assert run(folder / "model", "Compare.", "--image", paths[0], "--image", paths[1]) == 0
    expected = chat_with(loaded, [load_tiles(path, 2) for path in paths], "<image>\n<image>\nCompare.")
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_question_comes_from_a_pipe(folder, loaded, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is\nthis?\n"))
    assert run(folder / "model", "--system", "Be brief.") == 0
    model, _ = loaded
    model.system_message, own = "Be brief.", model.system_message
    expected = chat_with(loaded, [], "What is\nthis?")
    model.system_message = own
    assert capsys.readouterr().out == f"{expected}\n" and expected != chat_with(loaded, [], "What is\nthis?")


def test_frames_of_a_video_are_numbered(folder, loaded, capsys):
    assert run(folder / "model", "What happens?", "--video", folder / "frames") == 0
    transform = build_transform(False, 56)
    frames = [transform(Image.open(folder / "frames" / f"frame_{index}.png"))[None] for index in range(3)]
    question = "".join(f"Frame-{number}: <image>\n" for number in (1, 2, 3)) + "What happens?"
    assert capsys.readouterr().out == f"{chat_with(loaded, frames, question)}\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["model", ""], "the question is empty"),
        (["model", "Q?", "--image", "gone.png"], "gone.png"),
        (["gone", "Q?"], "the folder gone does not exist"),
        (["/nothere"], "the folder /nothere does not exist"),
        (["model", "caf\udce9"], "the question is not valid UTF-8"),
        (["model", "Q?", "--system", "caf\udce9"], "--system is not valid UTF-8"),
        (["model", "<IMG_CONTEXT>?"], "the question contains <IMG_CONTEXT>, which is reserved for images"),
        (["model", "Q?", "--temperature", "-1"], "--temperature -1.0 is invalid: expected a number >= 0"),
        (["model", "Q?", "--temperature", "nan"], "--temperature nan is invalid"),
        (["model", "Q?", "--batch_size", "0"], "--batch_size 0 is invalid"),
        (["model", "--input", "in.jsonl"], "--input and --output are required together"),
        (["model", "--input", "in.jsonl", "--output", "o.jsonl", "--image", "a.png"], "--input does not support"),
        (["model", "--input", "gone.jsonl", "--output", "o.jsonl"], "gone.jsonl"),
        (["model", "--input", "model/config.json", "--output", "o.jsonl"], "config.json is invalid"),
        (["model", "<image> <image>", "--image", "small.png"], "2 <image> for 1 images: remove an <image>, or add"),
    ],
)
def test_user_errors_are_one_sentence(folder, argv, part, monkeypatch):
    monkeypatch.chdir(folder)
    message = run(*argv)
    assert message.startswith("error: ") and part in message and "\n" not in message


# -- a session ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(folder, loaded):
    return ChatSession(*loaded, build_data_arguments(folder / "model"), (MEAN, STD), CONFIG)


def feed(session: ChatSession, *lines: str | BaseException | type[BaseException]) -> None:
    """Run a session with these lines, or exceptions in place of a line, then Ctrl-D."""
    remaining = iter([*lines, EOFError])

    def read_line(prompt: str) -> str:
        line = next(remaining)
        if isinstance(line, str):
            return line
        raise line

    run_session(session, read_line)


def test_a_session_has_history_and_images_of_several_turns(folder, loaded, session, capsys):
    image, other = folder / "wide.png", folder / "small.png"
    feed(
        session,
        f"/image {image}",
        "What is it?",
        "",
        "Sure?",
        f"/image '{other}'",
        "And <image> here?",
        "/reset",
        "Hm?",
    )
    tiles, more = [load_tiles(image)], [load_tiles(image), load_tiles(other)]
    history = [("<image>\nWhat is it?", chat_with(loaded, tiles, "<image>\nWhat is it?"))]
    history.append(("Sure?", chat_with(loaded, tiles, "Sure?", history)))
    last = chat_with(loaded, more, "And <image> here?", history)
    expected = [answer for _, answer in history] + [last, chat_with(loaded, [], "Hm?")]
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed == [line for answer in expected for line in answer.splitlines()] + [""]


def test_a_session_goes_on_after_errors_and_ctrl_c(session, capsys):
    feed(session, "/image gone.png", "/imag x", "/help", KeyboardInterrupt, "Hm?", "/exit", "never asked")
    printed = capsys.readouterr().out
    assert "error: " in printed and "gone.png" in printed and "error: /imag is no command" in printed
    assert "/video PATH" in printed and "Ctrl-D ends the session" in printed
    assert [question for question, _ in session.history] == ["Hm?"]


def test_a_pipe_that_is_not_utf8_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?"), "utf-8"))
    assert run(folder / "model") == "error: the question is not valid UTF-8"


def test_a_session_goes_on_after_texts_that_are_refused(session, capsys):
    damaged = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid")
    feed(session, damaged, "caf\udce9", "<IMG_CONTEXT>?", "Hm?")
    printed = capsys.readouterr().out
    assert printed.count("error: the question is not valid UTF-8") == 2
    assert "error: the question contains <IMG_CONTEXT>, which is reserved" in printed
    assert [question for question, _ in session.history] == ["Hm?"]


def test_ctrl_c_ends_an_answer_where_it_is(session):
    shown = []

    def stop(text: str) -> None:
        before = "".join(shown).strip()
        shown.append(text)
        if not before and text.strip():
            raise KeyboardInterrupt

    session.generation_config = {**CONFIG, "max_new_tokens": 200}
    assert session.ask("Tell me a long story.", show_fn=stop) == ""
    [(question, answer)] = session.history
    assert question == "Tell me a long story." and answer and answer.startswith("".join(shown).strip())
    num_tokens = len(session.tokenizer(answer)["input_ids"])
    assert num_tokens < 100


def test_an_interrupted_prompt_leaves_the_session_as_it_was(session, folder, monkeypatch):
    session.attach_image(str(folder / "small.png"))
    monkeypatch.setattr(
        type(session.model), "generate", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert session.ask("Q?") == ""
    assert session.history == [] and session.tiles == [] and session.attached_images == [str(folder / "small.png")]


def test_streamed_text_is_the_answer(session, loaded):
    shown = []
    assert session.ask("Why?", show_fn=shown.append) == ""
    assert len(shown) > 1 and "".join(shown).strip() == session.history[0][1] == chat_with(loaded, [], "Why?")


# -- a file ------------------------------------------------------------------------------------------------------------

RECORDS = [
    {"id": "a", "image": "wide.png", "conversations": make_turns("What is it?", "A wall.")},
    {"conversations": make_turns("Who?", "Me.", "And?"), "answers": ["You."], "own_key": [1, None]},
    {"image": "gone.png", "conversations": make_turns("Where?", "Gone.")},
    {"image": ["wide.png", "small.png"], "conversations": make_turns("<image>\nA?", "A.", "<image>\nB?", "B.")},
    {"conversations": [{"from": "system", "value": "Be brief."}, *make_turns("Why?", "So.")]},
]


@pytest.fixture
def data(folder, tmp_path) -> Path:
    """An annotation file beside its images."""
    for name in ("wide.png", "small.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return tmp_path


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def answer_file(folder: Path, data: Path, *flags, input_name: str = "data.jsonl") -> int:
    return run(folder / "model", "--input", data / input_name, "--output", data / "out.jsonl", *flags)


def test_a_file_is_answered_as_annotation_lines(folder, data, loaded, capsys):
    assert answer_file(folder, data) == 1
    printed = capsys.readouterr()
    assert "4 questions answered, 1 records skipped" in printed.out
    assert printed.err.startswith("Skipped: data line 3 (") and "gone.png" in printed.err
    lines = {line["line"]: line for line in read_lines(data / "out.jsonl")}
    assert list(lines) == [1, 2, 4, 5]
    assert lines[1]["prediction"] == chat_with(loaded, [load_tiles(folder / "wide.png")], "<image>\nWhat is it?")
    assert lines[2]["prediction"] == chat_with(loaded, [], "And?", [("Who?", "Me.")])
    pair = [load_tiles(folder / name, 2) for name in ("wide.png", "small.png")]
    assert lines[4]["prediction"] == chat_with(loaded, pair, "<image>\nB?", [("<image>\nA?", "A.")])
    assert lines[1] == {
        "id": "a",
        "image": str(data / "wide.png"),
        "conversations": make_turns("What is it?", lines[1]["prediction"]),
        "references": ["A wall."],
        "prediction": lines[1]["prediction"],
        "set": "data",
        "line": 1,
    }
    assert lines[2]["references"] == ["You."] and lines[2]["own_key"] == [1, None]
    # The lines are valid records, whose images any root above them finds.
    _, tokenizer = loaded
    entry = {"root": "/", "annotation": str(data / "out.jsonl")}
    dataset = LazySupervisedDataset("out", entry, tokenizer, 4, build_data_arguments(folder / "model"))
    assert [dataset.measure(index)[2] for index in range(4)] == [3, 0, 4, 0]


def test_an_interrupted_file_is_continued(folder, data, loaded, capsys, monkeypatch):
    assert answer_file(folder, data) == 1
    output = data / "out.jsonl"
    complete = output.read_text()
    lines = complete.splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote
    assert answer_file(folder, data) == 1
    assert "2 questions answered (2 were before), 1 records skipped" in capsys.readouterr().out
    assert output.read_text() == complete
    Image.new("RGB", (40, 40)).save(data / "gone.png")  # the file was repaired
    assert answer_file(folder, data) == 0
    assert [line["line"] for line in read_lines(output)] == [1, 2, 4, 5, 3]
    monkeypatch.setattr("internvl.model.internvl_chat.InternVLChatModel.generate", None)  # it is not asked again
    assert answer_file(folder, data) == 0


@pytest.mark.parametrize(
    "line", ['{"set": "data", "line": 1, "conversations": []}', "[1]", "{", '{"set": [], "line": {}}']
)
def test_an_output_with_other_lines_is_not_touched(folder, data, line):
    (data / "out.jsonl").write_text(f"{line}\n")
    message = answer_file(folder, data)
    assert message.startswith("error: line 1 of --output") and "is no answer to" in message
    assert (data / "out.jsonl").read_text() == f"{line}\n"


def test_output_that_is_the_input_is_an_error(folder, data):
    before = (data / "data.jsonl").read_text()
    message = run(folder / "model", "--input", data / "data.jsonl", "--output", data / "data.jsonl")
    assert message == f"error: --output {data}/data.jsonl is the input: choose another file"
    assert (data / "data.jsonl").read_text() == before


@pytest.mark.multiprocess
def test_a_meta_file_is_answered_by_two_ranks(folder, data, tmp_path):
    entry = {"root": str(data), "annotation": str(data / "data.jsonl"), "repeat_time": 2}
    (data / "text.jsonl").write_text(
        "\n".join(json.dumps({"conversations": make_turns(f"{i}?", "A.")}) for i in range(5))
    )
    (data / "meta.json").write_text(
        json.dumps({"mixed": entry, "text": entry | {"annotation": str(data / "text.jsonl")}})
    )
    assert answer_file(folder, data, input_name="meta.json") == 1
    expected = read_lines(data / "out.jsonl")
    assert len(expected) == 9
    flags = ["--max_new_tokens", str(NUM_TOKENS), "--dtype", "float32", "--batch_size", "2"]
    command = [str(PROGRAM), str(folder / "model"), "--input", str(data / "meta.json"), *flags]
    paths = os.pathsep.join([str(REPO_ROOT / "internvl_chat"), str(REPO_ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ranks = ForkedRanks([*command, "--output", str(data / "two.jsonl")], env, 2, find_free_port(), tmp_path)
    done = ranks.wait()
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stdout.count("9 questions answered, 1 records skipped") == 1
    assert read_lines(data / "two.jsonl") == expected


@pytest.mark.multiprocess
def test_a_session_in_a_real_terminal(folder):
    """Ctrl-C ends an answer, Ctrl-D the session."""
    terminal, end_of_program = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(REPO_ROOT / "internvl_chat"), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, PROGRAM, folder / "model", "--max_new_tokens", "400", "--dtype", "float32"]
    program = subprocess.Popen(
        [*map(str, command)], env=env, stdin=end_of_program, stdout=end_of_program, stderr=end_of_program,
        start_new_session=True, preexec_fn=make_controlling_terminal,
    )  # fmt: skip
    os.close(end_of_program)
    output = b""

    def read_until(text: bytes) -> None:
        nonlocal output
        deadline = time.monotonic() + 120
        while text not in output:
            assert time.monotonic() < deadline, output
            output += os.read(terminal, 4096)

    read_until(b"> ")
    output = b""
    os.write(terminal, b"Tell me a story.\n")
    read_until(b"story.\r\n")
    output = b""
    while len(output) < 20:  # the answer has begun
        output += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    read_until(b"> ")
    os.write(terminal, b"\x04")
    assert program.wait(timeout=60) == 0


def make_controlling_terminal() -> None:
    """Make the standard input the terminal that sends signals to this session."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_chat(["--help"])
    assert stopped.value.code == 0 and internvl.tools.chat.__doc__.splitlines()[0] in capsys.readouterr().out
