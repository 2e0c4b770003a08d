"""The study's page: what the parts say, put in words, as HTML and as Markdown.

Each part gives, by bit width, a gap

    quantisation − pruning at equal size      above 0: quantisation loses less

in dB of SQNR or in points of accuracy. The parts are ordered: the later, the closer to what a user
wants, so the answer is the word of the last one that has been run, and says where others disagree.
Gaps within EVEN count for neither. The page holds its pictures and asks no network for anything.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape

from pruning_vs_quantization.expected_error import sparsity_percent

QUESTION = (
    "b-bit weights take the room of 16-bit weights of which a share of b/16 is kept. "
    "Which of the two loses less?"
)
LEGEND = "Quantisation − pruning: above 0, quantisation loses less."
EVEN = {"dB": 0.1, "points": 0.3}  # points: the standard error of a difference on 10,000 images
COMMANDS = {  # part: what to run for it, in the order of the answer's weight
    "densities": "python -m pruning_vs_quantization.expected_sqnr",
    "weights": "python -m pruning_vs_quantization.quant_pruning_weights_sqnr --models MODEL",
    "layer outputs": "python -m pruning_vs_quantization.post_training_quant_acts_sqnr "
    "quant-bounds-data-opt … and post_training_pruning_acts_sqnr …",
    "fine-tuning": "python -m pruning_vs_quantization.main train-compressed … and … table …",
}


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    folded: str = ""  # a heading under which the page hides it until it is asked for

    @classmethod
    def parse(cls, text: str) -> Table:
        """From Markdown."""
        lines = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in text.splitlines()
            if line.strip()
        ]
        return cls(lines[0], lines[2:])


@dataclass
class Section:
    """What one part says of one network."""

    part: str  # of COMMANDS
    subject: str  # of whom
    unit: str
    gaps: dict[float, float]  # bits → quantisation − pruning
    text: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)  # caption, PNG

    @property
    def title(self) -> str:
        return f"{self.part.capitalize()}: {self.subject}"


def signed(value: float | None, unit: str = "", digits: int = 2) -> str:
    """`+4.13 dB`; a dash for nothing."""
    if value is None:
        return "–"
    text = f"{round(value, digits) + 0.0:+.{digits}f} {unit}".strip()
    return text.replace("-", "−").replace("inf", "∞")


# ------------------------------------------------------------------------------------ the answer


def better(gap: float, unit: str) -> str:
    """Which of the two a gap speaks for."""
    if abs(gap) <= EVEN[unit]:
        return "neither"
    return "quantisation" if gap > 0 else "pruning"


def answer(sections: list[Section]) -> str:
    """The study's question answered: in a sentence or two, by what counts most of what was run."""
    sections = [section for section in sections if section.gaps]
    if not sections:
        return "No size has been both quantised and pruned yet, so there is nothing to compare."
    last = sections[-1]
    by_winner: dict[str, list[str]] = {}
    for bits in sorted(last.gaps, reverse=True):
        gap = f"{bits:g} bits ({signed(last.gaps[bits], last.unit)})"
        by_winner.setdefault(better(last.gaps[bits], last.unit), []).append(gap)
    parts = [f"{winner} is better at {listed(sizes)}" for winner, sizes in by_winner.items()]
    heads = {"quantisation": "Quantise.", "pruning": "Prune.", "neither": "Either will do."}
    head = heads[next(iter(by_winner))] if len(by_winner) == 1 else "It depends on the size."
    text = f"{head} By {last.part}, {last.subject}: {'; '.join(parts)}."
    return text.replace("neither is better", "neither is clearly better") + dissent(sections)


def dissent(sections: list[Section]) -> str:
    """Where an earlier part says otherwise than the last."""
    last, found = sections[-1], []
    for section in sections[:-1]:
        bits = [
            f"{bits:g} bits ({signed(gap, section.unit)})"
            for bits, gap in section.gaps.items()
            if bits in last.gaps and better(gap, section.unit) != better(last.gaps[bits], last.unit)
        ]
        if bits:
            found.append(f"{section.part}, {section.subject}, at {listed(bits)}")
    if found:
        return f" Otherwise by {'; '.join(found)}."
    return " What else has been run agrees." if sections[:-1] else ""


def listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def summary_table(sections: list[Section]) -> Table:
    """Quantisation − pruning, a row per size and a column per part."""
    sections = [section for section in sections if section.gaps]
    sizes = sorted({bits for section in sections for bits in section.gaps}, reverse=True)
    head = ["bits", "sparsity", *(section.title for section in sections)]
    return Table(
        head,
        [
            [
                f"{bits:g}",
                sparsity_percent(bits),
                *(
                    signed(section.gaps.get(bits), section.unit) if bits in section.gaps else "–"
                    for section in sections
                ),
            ]
            for bits in sizes
        ],
    )


# -------------------------------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --paper: #fdfdfc;
  --line: #dcdde0; --tint: #eef3f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e5e8; --soft: #a0a6b1; --paper: #17191c;
  --line: #363a41; --tint: #1f2833; } }
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 56rem; background: var(--paper);
  color: var(--ink); font: 1.02rem/1.6 "Iowan Old Style", Charter, Georgia, serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1.25rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; }
p { max-width: 42rem; }
.answer { background: var(--tint); border-left: 4px solid #0072b2; padding: .9rem 1.2rem;
  font-size: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font: .85rem/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
summary { cursor: pointer; color: var(--soft); font: .85rem/1.5 system-ui, sans-serif; }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; max-height: 32rem; background: #fff; border-radius: 6px; }
figcaption, footer { color: var(--soft); font: .85rem/1.5 system-ui, sans-serif;
  margin-top: .5rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def html_table(table: Table) -> str:
    columns = [
        [row[i] for row in table.rows if row[i] not in ("", "–")] for i in range(len(table.head))
    ]
    words = [
        bool(column) and not any(cell.lstrip("+-−≥ ")[:1] in "0123456789∞" for cell in column)
        for column in columns
    ]

    def cells(row: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' * text}>{escape(cell)}</{tag}>"
            for cell, text in zip(row, words, strict=True)
        )

    rows = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    text = (
        f"<div class=wide><table>\n<thead><tr>{cells(table.head, 'th')}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{escape(table.folded)}</summary>{text}</details>"
    return text


def html_picture(caption: str, png: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<figure><img alt="{escape(caption)}" src="{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def html_page(title: str, sections: list[Section]) -> str:
    """The whole page, pictures inside."""
    parts = []
    for section in sections:
        parts += [
            f"<h2>{escape(section.title)}</h2>",
            f"<p>{escape(section.text)}</p>",
            *map(html_table, section.tables),
            *(html_picture(*picture) for picture in section.pictures),
        ]
    missing = "".join(
        f"<p>Not run: {part}. <code>{escape(command)}</code></p>"
        for part, command in not_run(sections)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(QUESTION)}</p>
<p class="answer">{escape(answer(sections))}</p>
{html_table(summary_table(sections))}
<p>{LEGEND}</p>
{chr(10).join(parts)}
<footer>{missing}</footer>
</body></html>
"""


def markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_page(title: str, sections: list[Section]) -> str:
    """The same without pictures."""
    parts = [
        f"# {title}",
        QUESTION,
        f"**{answer(sections)}**",
        markdown_table(summary_table(sections)),
        LEGEND,
    ]
    for section in sections:
        parts += [f"## {section.title}", section.text, *map(markdown_table, section.tables)]
    parts += [f"Not run: {part}. `{command}`" for part, command in not_run(sections)]
    return "\n\n".join(parts) + "\n"


def not_run(sections: list[Section]) -> list[tuple[str, str]]:
    return [
        (part, command)
        for part, command in COMMANDS.items()
        if all(section.part != part for section in sections)
    ]
