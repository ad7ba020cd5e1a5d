"""Render the quickstart's results as one self-contained HTML page."""

import base64
import math
import re
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #667080; --line: #d9dee5; --paper: #fbfbf9; --card: #fff;
  --good: #0b7a55; --bad: #b3372f; --base: #b07d12; --adapted: #1f5fa8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #98a2b0; --line: #343a43; --paper: #14171b;
  --card: #1c2026; --good: #4cc79a; --bad: #f0837a; --base: #d8b75a; --adapted: #7db4ef } }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 ui-sans-serif, system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .5rem }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem }
p { max-width: 47rem; margin: .5rem 0 } .soft, th, figcaption, text { color: var(--soft); fill: var(--soft) }
code { font-size: .9em } .scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 500; font-size: .85rem }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } td:nth-child(3) { font-weight: 650 }
.bar { display: inline-block; width: 7rem; height: .6rem; margin-right: .7rem; background: var(--line);
  border-radius: .3rem; overflow: hidden } .bar i { display: block; height: 100%; background: var(--adapted) }
.bar + span { display: inline-block; min-width: 3.4rem }
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
svg text { font: 12px ui-sans-serif, system-ui, sans-serif } .grid { stroke: var(--line) }
.trace { fill: none; stroke-width: 2; stroke-linejoin: round }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); gap: .9rem }
.domains { display: grid; grid-template-columns: repeat(8, 1fr); gap: .5rem; margin: 1.25rem 0 0 }
.domains img { border-radius: .35rem; outline: 1px solid var(--line) }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden }
img { display: block; width: 100% } figcaption { padding: .4rem .6rem .5rem; font-size: .8rem; line-height: 1.45 }
.right { color: var(--good) } .wrong { color: var(--bad) } b { font-weight: 600 }
"""

WIDTH, HEIGHT, LEFT, BOTTOM = 840, 300, 48, 32  # of the chart and its margins, in SVG units
CURVE_TITLES = {"base": "base model, plain digits", "adapted": "LoRA, shifted digits"}
NUM_DOMAIN_EXAMPLES = 8


def smooth_losses(losses: list[float], weight: float = 0.9) -> list[float]:
    """Compute the bias-corrected exponential moving average."""
    mean, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = weight * mean + (1 - weight) * loss
        smoothed.append(mean / (1 - weight**step))
    return smoothed


def choose_ticks(maximum: float) -> list[float]:
    """Choose 3 to 7 round values from 0 to `maximum`."""
    magnitude = 10 ** math.floor(math.log10(maximum))
    spacing = next(magnitude * factor for factor in (0.2, 0.5, 1, 2) if maximum <= 6 * magnitude * factor)
    return [spacing * number for number in range(int(maximum / spacing) + 1)]


def draw_loss_chart(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Draw smoothed losses by step as SVG, one line per training run."""
    lines = {}
    for name, curve in curves.items():
        steps, losses = zip(*curve, strict=True)
        lines[name] = list(zip(steps, smooth_losses(list(losses)), strict=True))
    points = [point for line in lines.values() for point in line]
    max_step, max_loss = max(step for step, _ in points), max(loss for _, loss in points)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * step / max_step

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 16) * loss / max_loss

    elements = []
    for loss in choose_ticks(max_loss):
        elements.append(f'<path class="grid" d="M{LEFT} {y(loss):.1f}H{WIDTH - 16}"/>')
        elements.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in choose_ticks(max_step):
        elements.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        path = "M" + "L".join(f"{x(step):.1f} {y(loss):.1f}" for step, loss in line)
        elements.append(f'<path class="trace" style="stroke:var(--{name})" d="{path}"/>')
        position = f'x="{WIDTH - 32}" y="{36 + 20 * number}" text-anchor="end" style="fill:var(--{name})"'
        elements.append(f"<text {position}>{CURVE_TITLES[name]}: {line[-1][1]:.3f} at the last step</text>")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss by step">{"".join(elements)}</svg>'


def embed_image(path: Path, alt: str) -> str:
    """Render an image tag that contains the PNG file."""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def render_example(example: dict, data_dir: Path) -> str:
    """Render an image with the answers before and after the adaptation."""
    lines = []
    for time in ("before", "after"):
        css_class = "right" if re.findall(r"\d+", example[time]) == [str(example["digit"])] else "wrong"
        lines.append(f'{time} <b class="{css_class}">{escape(example[time]) or "(nothing)"}</b>')
    image = embed_image(data_dir / example["image"], f"a {example['digit']}")
    return f"<figure>{image}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def render_domains(examples: list[dict], data_dir: Path) -> str:
    """Render scans in both domains: plain above, shifted below."""
    paths = [example["image"] for example in examples[:NUM_DOMAIN_EXAMPLES]]
    plain_paths = [path.replace("shifted", "plain") for path in paths]
    images = "".join(embed_image(data_dir / path, path.split("/")[0]) for path in plain_paths + paths)
    return f'<div class="domains">{images}</div>'


def render_table(lines: list[tuple[str, ...]]) -> str:
    """Render a table with bars for the percentages of the third column."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    body = ""
    for line in lines[1:]:
        cells = [escape(cell) for cell in line]
        cells[2] = f'<span class="bar"><i style="width:{cells[2]}"></i></span><span>{cells[2]}</span>'
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def render_page(results: dict, lines: list[tuple[str, ...]], data_dir: Path) -> str:
    """Render the page.

    Args:
        results: as in results.json.
        lines: the table's cells, headings first.
        data_dir: folder of the images, which are embedded.
    """
    total = results["rows"][0]["total"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>InternVL quickstart</title><style>{STYLE}</style></head><body>
<h1>A tiny InternVL learns to read digits, twice</h1>
<p class="soft">First all parameters are trained on plain digits: dark ink on white paper. This is the base model.
Then the domain shifts: the same scans as chalk on a patterned slate, rotated by 90 degrees, which the base model cannot
read. The recipe <code>shell/internvl2.5/8b_vit_lora.sh</code> trains LoRA adapters in its vision encoder and its LLM.
Accuracy is measured on {total} held-out scans, by asking the models and comparing their answers.</p>
{render_domains(results["examples"], data_dir)}
<h2>Accuracy on held-out digits</h2>{render_table(lines)}
<p class="soft">Wilson intervals. Time is that of the stage that made the model, from the start of its program. The
merged model and the adapters give different answers to {results["num_merged_differences"]} of {total} questions. All
stages took {results["seconds"]} s.</p>
<h2>Training loss</h2>{draw_loss_chart(results["losses"])}
<p class="soft">Loss by step, smoothed over about ten steps.</p>
<h2>Answers on shifted digits, before and after LoRA</h2>
<div class="examples">{"".join(render_example(example, data_dir) for example in results["examples"])}</div>
</body></html>
"""
