"""Gains over the best checkpoint in each family of models: README's figure and its statements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from . import common

BEST, GREEDY, ENSEMBLE, AGAIN = "Best checkpoint", "Greedy-Soup", "Ensemble", "best trained again"
DEFAULT = "Centered-Soup+"  # MEHLSoup(layerwise=True)
PAPER_FORM = "MEHL-Soup+"
CODE = {
    GREEDY: "`GreedySoup()`",
    DEFAULT: "`MEHLSoup(layerwise=True)`",
    PAPER_FORM: "MEHL-Soup+ (coefficients per layer) with the settings of its paper",
    ENSEMBLE: "The ensemble of all checkpoints",
    AGAIN: "Training the best configuration again on the training *and* validation data",
}
TITLES = {"convnet": "ConvNet", "vit": "ViT", "resnet": "ResNet", "text": "Text encoder"}
SHIFT_TITLES = {"photos": "EfficientNet, photos", "photos-vit": "ViT, photos", **TITLES}
LANGUAGE_TITLES = {"language": "Language model", "language-lora": "Language model, LoRA"}
BLUE, ORANGE, GREY, GREEN, PURPLE = "#0072B2", "#E69F00", "#767676", "#009E73", "#CC79A7"
MARKERS = (  # colors that color-blind readers tell apart, and a marker each
    (GREEDY, "Greedy", ORANGE, "^"), ("Learned-Soup+", "Learned, per layer", PURPLE, "s"),
    (DEFAULT, "MEHLSoup(layerwise=True)", BLUE, "o"),
    (ENSEMBLE, "Ensemble (K times the inference cost)", GREY, "D"),
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Test scores of the systems on the fine-tunings of one kind of model, seed by seed."""

    title: str
    scores: Sequence[Mapping[str, float]]  # accuracy in percent, or perplexity
    is_perplexity: bool = False

    def gains(self, system: str, rival: str = BEST) -> list[float]:
        """Points of accuracy, or by how many percent the perplexity is lower; paired by seed.

        Empty for a system that was not measured, or whose search diverged on a seed.
        """
        if any(system not in one or rival not in one for one in self.scores):
            return []
        if self.is_perplexity:
            return [100 * (1 - one[system] / one[rival]) for one in self.scores]
        return [one[system] - one[rival] for one in self.scores]


def _scores(systems: Mapping[str, Any], key: str, scale: float = 1.0) -> dict[str, float]:
    return {name: scale * one[key] for name, one in systems.items() if one}


def families(found: Mapping[str, Any]) -> list[Family]:
    """All families that results exist for, a family once: ``found`` holds results by experiment."""
    ten = found["tables_1_2"]["results"]
    all_of_them = [
        Family(title, [_scores(seed["systems"], "test", 100) for seed in ten[kind]])
        for kind, title in TITLES.items()
        if kind in ten
    ]

    def results(name: str) -> Mapping[str, Any]:
        empty: dict[str, Any] = {}
        return found.get(name, empty).get("results", empty)

    for kind, seeds in results("shift").items():
        if kind not in ten:
            clean = [
                {n: one["tests"]["clean"]["accuracy"] for n, one in seed["systems"].items() if one}
                for seed in seeds
            ]
            all_of_them.append(Family(SHIFT_TITLES.get(kind, kind), clean))
    for kind, seeds in results("adapters").items():
        again = results("adapters_instead").get(kind, [{"systems": {}}] * len(seeds))
        both = zip(seeds, again, strict=True)
        scores = [_scores(one["systems"] | other["systems"], "test") for one, other in both]
        all_of_them.append(Family("Text encoder, LoRA", scores))
    for kind, seeds in results("language").items():
        scores = [_scores(seed["systems"], "test") for seed in seeds]
        all_of_them.append(Family(LANGUAGE_TITLES.get(kind, kind), scores, is_perplexity=True))
    return all_of_them


# --------------------------------------------------------------- verdicts, and statements of them


def is_above(values: Sequence[float], least: float = 0.0) -> bool | None:
    """Whether the mean is above that; None where the 95 % interval includes it."""
    mean, half = common.mean_and_interval(values)
    return mean > least if abs(mean - least) > half else None


def verdict(values: Sequence[float], least: float = 0.0, digits: int = 2) -> str:
    """✓, ✗ or inconclusive, with the mean difference and its 95 % interval."""
    mean, half = common.mean_and_interval(values)
    mark = {True: "✓ {}", False: "✗ {}", None: "inconclusive ({})"}[is_above(values, least)]
    return mark.format(f"{mean:+.{digits}f} ± {half:.{digits}f}")


Sides = Mapping[bool | None, Sequence[str]]  # better, worse, inconclusive: families and gains


def compared(some: Sequence[Family], system: str, rival: str) -> Sides:
    """In which families a system is better or worse than another one, or neither."""
    sides: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for family in some:
        if not (gains := family.gains(system, rival)):
            continue
        mean, half = common.mean_and_interval(gains)
        if family.is_perplexity:
            direction = "lower" if mean > 0 else "higher"
            gain = f"{abs(mean):.1f} ± {half:.1f} % {direction} perplexity"
        else:
            gain = f"{mean:+.1f} ± {half:.1f}"
        sides[is_above(gains)].append(f"{family.title} {gain}")
    return sides


def statement(some: Sequence[Family], system: str, rival: str, of_rival: str) -> str:
    """In how many families a system is better than another one, and where."""
    sides = compared(some, system, rival)

    def where(cells: Sequence[str]) -> str:
        return f" ({'; '.join(cells)})" if cells else ""

    return (
        f"{CODE[system]} is better than {of_rival} in {len(sides[True]) or 'none'} of "
        f"{sum(map(len, sides.values()))} families of models{where(sides[True])}, worse in "
        f"{len(sides[False]) or 'none'}{where(sides[False])}, and inconclusive in "
        f"{len(sides[None]) or 'none'}."
    )


def worst_seed(some: Sequence[Family], system: str) -> str:
    """The largest loss of accuracy against the best checkpoint on any seed, and where."""
    gain, title = min(
        (gain, family.title)
        for family in some
        if not family.is_perplexity
        for gain in family.gains(system)
    )
    return f"{gain:+.1f} points ({title})"


def statements(some: Sequence[Family]) -> dict[str, str]:
    """One statement for each claim, in Markdown; README and the docs quote them."""

    def against_best(system: str) -> str:
        return (
            f"{statement(some, system, BEST, 'the best checkpoint')} Its worst result on a single "
            f"seed is {worst_seed(some, system)}."
        )

    return {
        "best": against_best(DEFAULT),
        "greedy_best": against_best(GREEDY),
        "greedy": statement(some, DEFAULT, GREEDY, CODE[GREEDY]),
        "ensemble": statement(some, ENSEMBLE, DEFAULT, CODE[DEFAULT]),
        "again": statement(some, AGAIN, DEFAULT, CODE[DEFAULT]),
        "paper": against_best(PAPER_FORM),
        "paper_default": statement(some, PAPER_FORM, DEFAULT, CODE[DEFAULT]),
    }


def readme_table(some: Sequence[Family]) -> str:
    """The statements that README shows, as a table in Markdown."""
    rows = [
        (CODE[DEFAULT], DEFAULT, "the best checkpoint", BEST),
        (CODE[ENSEMBLE], ENSEMBLE, CODE[DEFAULT], DEFAULT),
        (CODE[AGAIN], AGAIN, CODE[DEFAULT], DEFAULT),
        (CODE[PAPER_FORM], PAPER_FORM, CODE[DEFAULT], DEFAULT),
    ]
    lines = ["| | against | better | worse | inconclusive |", "| --- | --- | --- | --- | --- |"]
    for title, system, of_rival, rival in rows:
        sides = compared(some, system, rival)
        better, worse = (
            f"{len(cells)}: {'; '.join(cells)}" if (cells := sides[side]) else "none"
            for side in (True, False)
        )
        lines.append(
            f"| {title} | {of_rival} | {better} | {worse} | {len(sides[None]) or 'none'} |"
        )
    return "\n".join(lines)


def seeds_of(some: Sequence[Family]) -> str:
    numbers = sorted({len(family.scores) for family in some})
    return " to ".join(map(str, [numbers[0], *numbers[1:][-1:]]))


# --------------------------------------------------------------------------------- README's figure


def draw(some: Sequence[Family], path: Path) -> None:
    """Left what a soup is, right what it gains; the white background also serves dark pages."""
    with mpl.rc_context({"svg.hashsalt": "sksoup", "font.size": 9}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, 4.6), layout="constrained", width_ratios=[0.8, 1.4]
        )
        _draw_mix(left)
        _draw_gains(right, some)
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
        about = {"Date": None, "Description": described(some)}
        figure.savefig(path, metadata=about, facecolor="white")
        plt.close(figure)


def described(some: Sequence[Family]) -> str:
    """The numbers of the figure as text, which is kept in its file."""
    numbers = []
    for family in some:
        for system, label, *_ in MARKERS:
            if gains := family.gains(system):
                mean, half = common.mean_and_interval(gains)
                numbers.append(f"{family.title}, {label}: {mean:+.2f} ± {half:.2f}")
    return "; ".join(numbers)


def _draw_mix(ax: Any) -> None:
    """Checkpoints, a coefficient each, one model."""
    ax.set(xlim=(0, 10), ylim=(0, 10))
    ax.axis("off")
    ax.set_title("Many checkpoints become one model", fontweight="bold")
    for y, number in ((8.2, "1"), (6.2, "2"), (2.2, "K")):
        _box(ax, (0.1, y), (4.4, 1.2), f"$c_{{{number}}}$ × checkpoint {number}", "#DCE9F3")
        arrow = FancyArrowPatch((4.6, y + 0.6), (6.5, 5.2 + (y - 5.2) * 0.15), arrowstyle="-|>",
                                mutation_scale=11, color=GREY)  # fmt: skip
        ax.add_patch(arrow)
    ax.text(2.3, 4.7, "⋮", ha="center", va="center", fontsize=14)
    _box(ax, (6.7, 4.3), (3.1, 1.8), "soup:\none model", "#CFE8DF")
    ax.text(5, 0.5, "Fine-tuned from the same start. The coefficients are fitted\n"
            "on validation data. Inference costs as much as before.",
            ha="center", va="center", color="#333333", fontsize=8.5)  # fmt: skip


def _box(
    ax: Any, at: tuple[float, float], size: tuple[float, float], text: str, color: str
) -> None:
    box = FancyBboxPatch(at, *size, boxstyle="round,pad=0.05,rounding_size=0.3", facecolor=color,
                         edgecolor="#444444", linewidth=0.8)  # fmt: skip
    ax.add_patch(box)
    ax.text(at[0] + size[0] / 2, at[1] + size[1] / 2, text, ha="center", va="center")


def _draw_gains(ax: Any, some: Sequence[Family]) -> None:
    """The paired gain of each system in each family, with its 95 % interval."""
    ax.axvline(0, color="#444444", linewidth=0.9, zorder=1)
    for i, (system, label, color, marker) in enumerate(MARKERS):
        rows = [(j, gains) for j, family in enumerate(some) if (gains := family.gains(system))]
        means, halves = zip(*(common.mean_and_interval(gains) for _, gains in rows), strict=True)
        ax.errorbar(means, [j + (i - 1.5) * 0.19 for j, _ in rows], xerr=halves, linestyle="none",
                    color=color, marker=marker, markersize=5, capsize=2, label=label)  # fmt: skip
    for j in range(0, len(some), 2):
        ax.axhspan(j - 0.5, j + 0.5, color="#F4F4F4", zorder=0)
    ax.set_yticks(range(len(some)), [family.title for family in some])
    ax.set(ylim=(len(some) - 0.5, -0.5))
    ax.set_xlabel("points of accuracy; language models: percent less perplexity")
    ax.set_title("Gain over the best checkpoint on test data, 95 % intervals", fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
