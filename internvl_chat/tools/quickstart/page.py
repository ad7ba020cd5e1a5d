"""The quickstart's results as one HTML page: no scripts, no fonts, no files beside it. Called by report.py."""

import base64
import re
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #667080; --line: #d9dee5; --paper: #fbfbf9; --card: #fff;
  --good: #0b7a55; --bad: #b3372f; --base: #8a6d1f; --adapted: #1f5fa8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #98a2b0; --line: #343a43; --paper: #14171b;
  --card: #1c2026; --good: #4cc79a; --bad: #f0837a; --base: #d8b75a; --adapted: #7db4ef } }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 ui-sans-serif, system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .5rem }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem }
p { max-width: 40rem; margin: .5rem 0 } .soft, th, figcaption, text { color: var(--soft); fill: var(--soft) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: right; padding: .45rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 500; font-size: .85rem }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } td:nth-child(3) { font-weight: 650 }
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
svg text { font: 12px ui-sans-serif, system-ui, sans-serif } .grid { stroke: var(--line) }
.trace { fill: none; stroke-width: 2; stroke-linejoin: round }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); gap: .9rem }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden }
img { display: block; width: 100% } figcaption { padding: .4rem .6rem .5rem; font-size: .8rem; line-height: 1.45 }
.right { color: var(--good) } .wrong { color: var(--bad) } b { font-weight: 600 }
"""

WIDTH, HEIGHT, LEFT, BOTTOM = 840, 300, 48, 32


def smooth(losses: list[float], weight: float = 0.9) -> list[float]:
    """Running mean that forgets, free of its start's bias."""
    mean, out = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = weight * mean + (1 - weight) * loss
        out.append(mean / (1 - weight**step))
    return out


def chart(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Smoothed loss by step as SVG, one line a training."""
    lines = {name: list(zip((s for s, _ in c), smooth([x for _, x in c]), strict=True)) for name, c in curves.items()}
    points = [point for line in lines.values() for point in line]
    steps, top = max(step for step, _ in points), max(loss for _, loss in points)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * step / steps

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 16) * loss / top

    parts = []
    for quarter in range(5):
        loss, step = top * quarter / 4, steps * quarter / 4
        parts.append(f'<path class="grid" d="M{LEFT} {y(loss):.1f}H{WIDTH - 16}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.1f}</text>')
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:.0f}</text>')
    for number, (name, line) in enumerate(lines.items()):
        path = "M" + "L".join(f"{x(step):.1f} {y(loss):.1f}" for step, loss in line)
        parts.append(f'<path class="trace" style="stroke:var(--{name})" d="{path}"/>')
        label = f'x="{WIDTH - 32}" y="{36 + 20 * number}" text-anchor="end" style="fill:var(--{name})"'
        parts.append(f"<text {label}>{name}: {line[-1][1]:.3f} at the end</text>")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss by step">{"".join(parts)}</svg>'


def figure(picture: dict, data: Path) -> str:
    image = base64.b64encode((data / picture["image"]).read_bytes()).decode()
    lines = []
    for when in ("before", "after"):
        kind = "right" if re.findall(r"\d+", picture[when]) == [str(picture["digit"])] else "wrong"
        lines.append(f'{when} <b class="{kind}">{escape(picture[when]) or "(nothing)"}</b>')
    source = f"data:image/png;base64,{image}"
    return (
        f'<figure><img alt="a {picture["digit"]}" src="{source}"><figcaption>{"<br>".join(lines)}</figcaption></figure>'
    )


def page(results: dict, lines: list[tuple[str, ...]], data: Path) -> str:
    """The page. `lines` are the table's, headings first; pictures are read from `data` and put into the text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines[1:])
    total = results["rows"][0]["total"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>InternVL quickstart</title><style>{STYLE}</style></head><body>
<h1>A tiny InternVL learns to read digits, twice</h1>
<p class="soft">First in full, from dark ink on white paper. Then the same scans change looks (inverted, turned by
90 degrees, on a patterned ground) and the recipe <code>shell/internvl2.5/8b_vit_lora.sh</code> trains adapters in its
vision encoder and its language model. Everything below was measured on {total} scans that no training saw, by asking
the models and reading their answers.</p>
<h2>Digits read correctly</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>
<p class="soft">Intervals are Wilson's. "Stage" is the wall time of the stage that made the model, start of the program
included. Merged weights answer {results["merged_differs"]} of {total} questions otherwise than the adapters do. All
stages together took {results["seconds"]} s.</p>
<h2>Loss</h2>{chart(results["losses"])}
<p class="soft">Training loss by step, a running mean over about ten steps.</p>
<h2>Answers before and after</h2>
<div class="pictures">{"".join(figure(picture, data) for picture in results["pictures"])}</div>
</body></html>
"""
