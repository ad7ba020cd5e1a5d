"""Special tokens, pixel statistics, shared memory, unusable samples; imports only the standard library."""

import reprlib

IMG_CONTEXT_TOKEN = "<IMG_CONTEXT>"
IMG_START_TOKEN = "<img>"
IMG_END_TOKEN = "</img>"
QUAD_START_TOKEN = "<quad>"
QUAD_END_TOKEN = "</quad>"
REF_START_TOKEN = "<ref>"
REF_END_TOKEN = "</ref>"
BOX_START_TOKEN = "<box>"
BOX_END_TOKEN = "</box>"

# A tokenizer without them gets them in this order, which decides their ids. Published checkpoints depend on the ids.
SPECIAL_TOKENS = (
    IMG_START_TOKEN,
    IMG_END_TOKEN,
    IMG_CONTEXT_TOKEN,
    QUAD_START_TOKEN,
    QUAD_END_TOKEN,
    REF_START_TOKEN,
    REF_END_TOKEN,
    BOX_START_TOKEN,
    BOX_END_TOKEN,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The published models were trained with seven digits, not the eight of the CLIP release.
CLIP_MEAN = (0.4814546, 0.4578275, 0.40821073)
CLIP_STD = (0.2686295, 0.2613025, 0.2757711)
SIGLIP_MEAN = (0.5, 0.5, 0.5)
SIGLIP_STD = (0.5, 0.5, 0.5)

MAX_TILES_PER_IMAGE = 1024  # choosing a grid of tiles takes time quadratic in it
MAX_FRAMES_PER_VIDEO = 10_000
CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # of a multi-byte character, where an answer was cut off
IGNORE_INDEX = -100  # label of a token that is not a loss token

SHARED_MEMORY_DIR = "/dev/shm"  # where Linux puts shared memory
HOW_TO_ENLARGE = (
    "docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory; elsewhere, as root, "
    f"mount -o remount,size=8g {SHARED_MEMORY_DIR}"
)


def get_pad_id(tokenizer) -> int:
    """Return the id of the token that pads rows.

    It is 0, as in upstream, if the tokenizer has none. Padding is masked, so the choice has no effect on results.
    """
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class UnusableSample(ValueError):
    """A record that cannot be used as a sample; the message is the reason.

    Records may be untrusted: control characters, which a terminal would obey, and line breaks are escaped.
    """

    def __init__(self, message: str = ""):
        super().__init__(escape_control_characters(message))


def escape_control_characters(text: str) -> str:
    """Replace characters that cannot be printed, such as line breaks, by escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shorten(value: object, max_length: int = 100) -> str:
    """Format any value for a message, in at most `max_length` characters.

    Large and deeply nested values are not formatted in full first. Lone surrogates and control characters are escaped.
    """
    formatter = reprlib.Repr()
    formatter.maxstring = formatter.maxother = formatter.maxlong = max_length
    text = formatter.repr(value)
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."
