"""Draw the figures of the README and the guides: `python docs/make_figures.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "figures"
FROZEN, ADAPTED, DATA = "#dbe4f0", "#f6d9a8", "#eeeeee"
EDGE, TEXT = "#44546a", "#1f2933"
# Text stays text, and the file is the same whenever it is drawn.
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures", "font.family": "DejaVu Sans", "font.size": 9})


def new_axes(width: float, height: float):
    """Create axes whose units are tenths of an inch."""
    figure, axes = plt.subplots(figsize=(width / 10, height / 10))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def box(axes, x, y, width, height, text, color=FROZEN, **kwargs):
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1", fc=color, ec=EDGE, lw=1)
    axes.add_patch(style)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=TEXT, **kwargs)


def arrow(axes, start, end, text="", above=1.2):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=EDGE, lw=1))
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x, y + above, text, ha="center", va="bottom", fontsize=7, color=TEXT)


def save(figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / name, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def draw_model() -> None:
    """Draw the parts of the model and where LoRA is."""
    figure, axes = new_axes(98, 36)
    # An image of three tiles and its thumbnail.
    axes.add_patch(Rectangle((2, 14), 12, 8, fc=DATA, ec=EDGE))
    axes.text(8, 18, "image", ha="center", va="center", color=TEXT)
    arrow(axes, (14.5, 18), (18.5, 18))
    for column in range(3):
        axes.add_patch(Rectangle((19 + 4.4 * column, 18.6), 4, 4, fc=DATA, ec=EDGE))
    axes.add_patch(Rectangle((23.4, 13.4), 4, 4, fc=DATA, ec=EDGE))
    axes.text(25.4, 24, "tiles of 448 x 448", ha="center", fontsize=7.5, color=TEXT)
    axes.text(25.4, 11.2, "thumbnail", ha="center", fontsize=7.5, color=TEXT)
    arrow(axes, (33, 18), (37, 18))
    box(axes, 37.5, 11, 15, 14, "vision encoder\nInternViT\n300M or 6B")
    box(axes, 39, 26.5, 12, 4.5, "LoRA", ADAPTED)
    arrow(axes, (53, 18), (57, 18), "pixel\nshuffle", above=0.8)
    box(axes, 57.5, 13, 11, 10, "projector\nMLP", ADAPTED)
    arrow(axes, (69, 18), (74.5, 18), "256\ntokens\nper tile", above=0.8)
    box(axes, 75, 8, 21.5, 20, "LLM\nInternLM2, Qwen2,\nQwen3, Llama, ...")
    box(axes, 79.75, 29.5, 12, 4.5, "LoRA", ADAPTED)
    arrow(axes, (85.75, 4.6), (85.75, 7.6))
    axes.text(96.5, 2, "prompt and answer: What is it? A cat.", ha="right", fontsize=8, color=TEXT)
    for x, y in ((45, 26.3), (85.75, 29.3)):
        arrow(axes, (x, y), (x, y - 1.2))
    box(axes, 2, 3.6, 4, 3, "", FROZEN)
    axes.text(7, 5, "frozen", va="center", fontsize=8, color=TEXT)
    box(axes, 16, 3.6, 4, 3, "", ADAPTED)
    axes.text(21, 5, "trainable: adapters, optionally the projector", va="center", fontsize=8, color=TEXT)
    save(figure, "model.svg")


def draw_packing() -> None:
    """Draw packed rows and padded batches."""
    figure, axes = new_axes(98, 21)
    colors = ["#7fa7d1", "#9ccb9c", "#e3a36f", "#c39bd3", "#d98880", "#76d7c4", "#f4d03f", "#aab7b8"]
    padded = [5, 21, 9, 34]
    axes.text(1, 18.6, "padded batch: every sample is padded to the longest", fontsize=8.5, color=TEXT)
    for number, length in enumerate(padded):
        y = 14.4 - 3.6 * number
        axes.add_patch(Rectangle((1, y), 40, 2.8, fc="white", ec=EDGE, hatch="////", lw=0.6))
        axes.add_patch(Rectangle((1, y), length, 2.8, fc=colors[number], ec=EDGE, lw=0.6))
    axes.text(54, 18.6, "packed: rows filled with documents that do not see each other", fontsize=8.5, color=TEXT)
    rows = [[(3, 34), (0, 5)], [(1, 21), (2, 9), (4, 9)], [(5, 17), (6, 14), (7, 9)]]
    for number, row in enumerate(rows):
        x, y = 54, 14.4 - 3.6 * number
        for color, length in row:
            axes.add_patch(Rectangle((x, y), length, 2.8, fc=colors[color], ec=EDGE, lw=0.6))
            axes.text(x + length / 2, y + 1.4, "0 1 2 ...", ha="center", va="center", fontsize=6, color=TEXT)
            x += length
        axes.add_patch(Rectangle((x, y), 54 + 40 - x, 2.8, fc="white", ec=EDGE, hatch="////", lw=0.6))
    axes.text(54, 4.6, "position_ids restart at 0 for each document: the only boundary mark", fontsize=7.5, color=TEXT)
    axes.add_patch(Rectangle((54, 0.8), 4, 2.2, fc="white", ec=EDGE, hatch="////", lw=0.6))
    axes.text(59, 1.8, "padding", va="center", fontsize=8, color=TEXT)
    save(figure, "packing.svg")


if __name__ == "__main__":
    draw_model()
    draw_packing()
