"""The docs' page of the papers' tables and that of the readme, from the results: none is typed.

python -m benchmarks paper.page [--results benchmarks/paper/results] [--docs docs]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from . import common

# Li et al., arXiv:2407.03641: ImageNet, 72 CLIP ViT-B/32; test accuracy, seconds of construction
PAPER = {
    "Best checkpoint": ("80.38", "", ""),
    "Uniform-Soup": ("79.97", "", ""),
    "Greedy-Soup": ("81.03", "3501", "3 GB"),
    "Learned-Soup": ("80.88", "7514", "249 GB"),
    "Learned-Soup+": ("81.39", "7701", "253 GB"),
    "HL-Soup": ("81.14", "2479", "43 GB"),
    "HL-Soup+": ("81.45", "2903", "44 GB"),
    "MEHL-Soup": ("81.20", "776", "18 GB"),
    "MEHL-Soup+": ("81.62", "808", "19 GB"),
    "Ensemble": ("81.19", "", ""),
}
PAPER_REMOVED = {  # of 72: share removed -> Greedy-Soup, MEHL-Soup+
    "0": ("81.03", "81.62"),
    "2": ("80.78", "81.58"),
    "22": ("80.08", "81.44"),
    "42": ("79.70", "81.01"),
}
PAPER_MARGIN = 1.24  # of MEHL-Soup+ over the best checkpoint
PLUS = "MEHL-Soup+"
RIVALS = ("Best checkpoint", "Greedy-Soup", "Learned-Soup+", "HL-Soup+", "Ensemble")
TITLES = {"convnet": "ConvNet", "vit": "ViT", "resnet": "ResNet", "text": "Text encoder"}
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- made by benchmarks/paper/page.py: -->", "<!-- : -->"  # its table in the readme
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"
STYLES = (("Best checkpoint", GREY, "s"), ("Greedy-Soup", ORANGE, "^"), (PLUS, BLUE, "o"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    lines = [f".. list-table:: {title}".rstrip(), "    :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"    {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def pm(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95 % confidence interval, as text."""
    mean, half = common.mean_and_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def signed(values: Sequence[float]) -> str:
    mean, half = common.mean_and_interval(values)
    return f"{mean:+.2f} ± {half:.2f}"


def memory(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Of the seeds it was measured with."""
    measured = [seed["extra_memory"] for seed in seeds if seed["extra_memory"] is not None]
    return f"{statistics.mean(measured):.1f}" if measured else "–"


class Page:
    """The results of all experiments, and what is said of them."""

    def __init__(self, results: Path) -> None:
        self.found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
        self.ten = self.found["tables_1_2"]["results"]
        self.kinds = [kind for kind in TITLES if kind in self.ten]

    def test(self, kind: str, system: str) -> list[float]:
        return [100 * seed["systems"][system]["test"] for seed in self.ten[kind]]

    def gain(self, kind: str, rival: str) -> list[float]:
        """Paired by seed."""
        return [a - b for a, b in zip(self.test(kind, PLUS), self.test(kind, rival), strict=True)]

    def all_gains(self, rival: str) -> list[float]:
        """The mean over the zoos of each seed: seeds are what varies."""
        return [statistics.mean(gains) for gains in
                zip(*(self.gain(kind, rival) for kind in self.kinds), strict=True)]  # fmt: skip

    # ------------------------------------------------------------ sections

    def accuracy(self) -> str:
        rows = [
            [system, *(pm(self.test(kind, system)) for kind in self.kinds), PAPER[system][0]]
            for system in PAPER
        ]
        header = ["system", *(TITLES[kind] for kind in self.kinds), "ImageNet, ViT-B/32 (paper)"]
        gains = [
            [f"over {rival}", *(signed(self.gain(kind, rival)) for kind in self.kinds),
             signed(self.all_gains(rival)),
             f"{float(PAPER[PLUS][0]) - float(PAPER[rival][0]):+.2f}"]
            for rival in RIVALS
        ]  # fmt: skip
        return "\n".join([
            table(header, rows),
            f"What {PLUS} gains, in points, paired by seed:\n",
            table(["", *header[1:-1], "mean", "paper"], gains),
        ])  # fmt: skip

    def readme(self) -> str:
        """The readme, with the table of accuracy that these results give."""
        header = ["test accuracy, %", *(TITLES[kind] for kind in self.kinds)]
        rows = [[system, *(pm(self.test(kind, system)) for kind in self.kinds)] for system in PAPER]
        lines = [" | ".join(row) for row in [header, ["---"] * len(header), *rows]]
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        return "\n".join([before + BEGIN, *(f"| {line} |" for line in lines), END + after])

    def cost(self) -> str:
        rows = []
        for system in PAPER:
            runs = [[seed["systems"][system] for seed in self.ten[kind]] for kind in self.kinds]

            def each(get: Callable[[Any], float], digits: int, runs: Any = runs) -> str:
                return " / ".join(f"{statistics.mean(map(get, run)):.{digits}f}" for run in runs)

            epochs = runs[0][0]["epochs"]
            rows.append([
                system,
                each(lambda r: r["seconds"], 1),
                str(epochs or "–"),
                each(lambda r: r["seconds"] / r["epochs"] if r["epochs"] else 0.0, 2)
                if epochs else "–",
                each(lambda r: r["forward_passes"], 0),
                " / ".join(map(memory, runs)),
                PAPER[system][1],
                PAPER[system][2],
            ])  # fmt: skip
        header = ["system", "seconds", "epochs", "seconds per epoch", "forward passes",
                  "memory, models", "paper: seconds", "paper: memory"]  # fmt: skip
        zoos = ", ".join(TITLES[kind] for kind in self.kinds)
        return f"Zoos in the order {zoos}.\n\n" + table(header, rows)

    def removed(self) -> str:
        found, parts = self.found["table_3"]["results"], []
        for kind, seeds in found.items():
            rows = []
            for n in seeds[0]["removed"]:
                by_system = {system: [seed["removed"][n][system] for seed in seeds]
                             for system in seeds[0]["removed"][n]}  # fmt: skip
                gains = [a - b for a, b in
                         zip(by_system[PLUS], by_system["Greedy-Soup"], strict=True)]  # fmt: skip
                rows.append([n, *(pm(values) for values in by_system.values()), signed(gains)])
            parts.append(table(["removed", "Best checkpoint", "Greedy-Soup", PLUS,
                                f"{PLUS} over Greedy-Soup"], rows, TITLES[kind]))  # fmt: skip
        rows = [[n, *values] for n, values in PAPER_REMOVED.items()]
        parts.append(table(["removed of 72", "Greedy-Soup", PLUS], rows, "The paper, ImageNet"))
        return "\n".join(parts)

    def curve(self) -> str:
        """How many ingredients each soup needs, as the number on the curve tells."""
        found, rows = self.found["table_3"]["results"], []
        for kind, seeds in found.items():
            for system in ("Greedy-Soup", PLUS):
                rows.append([f"{TITLES[kind]}, {system}",
                             *(pm([s["kept"][n][system] for s in seeds])
                               for n in seeds[0]["kept"])])  # fmt: skip
        sizes = [" / ".join(ns) for ns in
                 zip(*(seeds[0]["kept"] for seeds in found.values()), strict=True)]  # fmt: skip
        return table(["ingredients", *sizes], rows)

    def outside(self) -> str:
        names = list(self.ten[self.kinds[0]][0]["coefficients"])
        rows = [
            [name, *(_percent(s["coefficients"][name]["outside"] for s in seeds)
                     for seeds in self.ten.values())]
            for name in names
        ]  # fmt: skip
        return table(["system", *(TITLES[kind] for kind in self.kinds)], rows)

    def ablations(self) -> str:
        found = self.found["ablations"]["results"]
        rows = [
            [name, *(cell for seeds in found.values() for cell in
                     (pm([s[name] for s in seeds]),
                      signed([s[name] - s[base_of(name)] for s in seeds])))]
            for name in next(iter(found.values()))[0]
        ]  # fmt: skip
        header = ["variant", *(cell for kind in found for cell in (TITLES[kind], "difference"))]
        return table(header, rows)

    def batch_norm(self) -> str:
        seeds = self.found["appendix_c"]["results"]["resnet"]
        policies = list(next(iter(seeds[0].values())))
        rows = [
            [system, *(pm([s[system][policy] for s in seeds]) for policy in policies)]
            for system in seeds[0]
        ]
        return table(["system", *policies], rows)

    def defaults(self) -> str:
        found = self.found["defaults"]["results"]
        first = next(iter(found.values()))[0]
        base = next(iter(first["variants"]))

        def mean_gain(name: str) -> float:
            return statistics.mean(
                s["variants"][name][1] - s["variants"][base][1]
                for seeds in found.values() for s in seeds
            )  # fmt: skip

        rows = [
            [name, *(cell for seeds in found.values() for cell in
                     (f"{statistics.mean(s['variants'][name][1] for s in seeds):.2f}",
                      signed([s["variants"][name][1] - s["variants"][base][1] for s in seeds]))),
             f"{mean_gain(name):+.2f}"]
            for name in sorted(first["variants"], key=mean_gain, reverse=True)
        ]  # fmt: skip
        header = ["variant", *(cell for kind in found for cell in (TITLES[kind], "difference")),
                  "mean"]  # fmt: skip

        def is_clearly_better(name: str) -> bool:
            for seeds in found.values():
                gains = [s["variants"][name][1] - s["variants"][base][1] for s in seeds]
                mean, half = common.mean_and_interval(gains)
                if mean > half:
                    return True
            return False

        better = [f"*{name}*" for name in first["variants"] if is_clearly_better(name)]
        said = (
            f"Better than it on a zoo by more than the interval: {', '.join(better) or 'none'}.\n"
        )
        parts = [table(header, rows), said]
        systems = list(next(iter(first["rows"].values())))
        rows = [
            [n, *(f"{statistics.mean(s['rows'][n][system] for s in seeds):.2f}"
                  for seeds in found.values() for system in systems)]
            for n in first["rows"]
        ]  # fmt: skip
        header = ["held-out rows", *(f"{TITLES[kind]}: {s}" for kind in found for s in systems)]
        return "\n".join([*parts, "How many held-out rows the coefficients need:\n",
                          table(header, rows)])  # fmt: skip

    def diverged(self) -> str:
        seeds = self.found["diverged"]["results"]["diverged"]
        rows = [[name, pm([s["test"][name] for s in seeds])] for name in seeds[0]["test"]]
        failed = [name for s in seeds for name in s["failed"] if name in s["named"]]
        wrong = [name for s in seeds for name in s["named"] if name not in s["failed"]]
        n_failed = sum(len(s["failed"]) for s in seeds)
        return "\n".join([
            table(["recipe", "test accuracy, %"], rows),
            f"Before its search {PLUS} warned and named {len(failed)} of the {n_failed} failed "
            f"ingredients of all seeds, and {len(wrong)} that had not failed: *leave out with "
            f"collection.drop(...)*. The last row does that.",
        ])  # fmt: skip

    # -------------------------------------------------------------- claims

    def claims(self) -> str:
        """The papers' claims, each measured on each zoo."""

        def verdict(values: Sequence[float], least: float = 0.0) -> str:
            mean, half = common.mean_and_interval(values)
            word = "yes" if mean >= least else "no"
            sure = "" if abs(mean - least) > half else ", within the interval"
            return f"{word} ({mean:+.2f} ± {half:.2f}{sure})"

        kinds, rows = self.kinds, []

        def claim(
            text: str, values: Callable[[str], list[float] | None], least: float = 0.0
        ) -> None:
            cells, all_values = [], []
            for kind in kinds:
                found = values(kind)
                cells.append("–" if found is None else verdict(found, least))
                if found is not None:
                    all_values.append(found)
            per_seed = [statistics.mean(v) for v in zip(*all_values, strict=True)]
            rows.append([text, *cells, verdict(per_seed, least)])

        for rival in ("Best checkpoint", "Greedy-Soup", "Learned-Soup+", "HL-Soup+", "Ensemble"):
            claim(f"{PLUS} is above {rival}", lambda kind, r=rival: self.gain(kind, r))
        claim(f"{PLUS} is above the best checkpoint by {PAPER_MARGIN} points",
              lambda kind: self.gain(kind, "Best checkpoint"), PAPER_MARGIN)  # fmt: skip
        for plus in ("Learned-Soup+", "HL-Soup+", "MEHL-Soup+"):
            one = plus.rstrip("+")
            claim(f"{plus} is above {one}",
                  lambda kind, p=plus, o=one: [a - b for a, b in
                  zip(self.test(kind, p), self.test(kind, o), strict=True)])  # fmt: skip
        claim("HL-Soup is above Learned-Soup: extrapolation helps",
              lambda kind: [a - b for a, b in zip(self.test(kind, "HL-Soup"),
              self.test(kind, "Learned-Soup"), strict=True)])  # fmt: skip
        claim("Greedy-Soup is above the best checkpoint",
              lambda kind: [a - b for a, b in zip(self.test(kind, "Greedy-Soup"),
              self.test(kind, "Best checkpoint"), strict=True)])  # fmt: skip
        removed = self.found["table_3"]["results"]

        def lost(kind: str) -> list[float] | None:
            if kind not in removed:
                return None
            return [s["removed"][list(s["removed"])[-1]][PLUS] - s["removed"]["0"][PLUS]
                    for s in removed[kind]]  # fmt: skip

        def beats(kind: str) -> list[float] | None:
            if kind not in removed:
                return None
            half = [s["removed"][list(s["removed"])[-1]] for s in removed[kind]]
            return [found[PLUS] - found["Greedy-Soup"] for found in half]

        claim(f"{PLUS} keeps within 0.6 points without the better half", lost, -0.6)
        claim(f"without the better half {PLUS} beats Greedy-Soup by a point", beats, 1.0)
        header = ["claim", *(TITLES[kind] for kind in kinds), "mean"]
        lines = [table(header, rows)]
        for column, name in enumerate(header[1:], start=1):
            cells = [row[column] for row in rows if row[column] not in ("", "–")]
            sure = [cell for cell in cells if "within" not in cell]
            n_yes = sum(cell.startswith("yes") for cell in sure)
            lines.append(
                f"* {name}: of {len(cells)} claims {n_yes} hold and {len(sure) - n_yes} do not; "
                f"{len(cells) - len(sure)} can't be told from their threshold."
            )
        return "\n".join(lines)

    # ------------------------------------------------------------- pictures

    def draw(self, folder: Path) -> None:
        mpl.rcParams.update({"svg.hashsalt": "sksoup", "font.size": 9})
        edges = np.asarray(self.found["tables_1_2"]["edges"])
        figure, axes = plt.subplots(1, len(self.kinds), figsize=(10, 2.8), layout="constrained")
        for ax, kind in zip(axes, self.kinds, strict=True):
            for name, color in (("Learned-Soup+", ORANGE), (PLUS, BLUE)):
                counts = np.sum([s["coefficients"][name]["histogram"] for s in self.ten[kind]], 0)
                ax.stairs(counts / counts.sum(), edges, color=color, label=name, fill=name == PLUS,
                          alpha=0.7 if name == PLUS else 1.0)  # fmt: skip
            ax.axvspan(0, 1, color=GREY, alpha=0.12, zorder=0)
            ax.set(title=TITLES[kind], xlabel="coefficient", yscale="log")
        axes[0].set_ylabel("share of coefficients")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        self._save(figure, folder / "paper_figure_1.svg")
        found = self.found["table_3"]["results"]
        figure, axes = plt.subplots(1, len(found), figsize=(10, 3), layout="constrained")
        for ax, (kind, seeds) in zip(axes, found.items(), strict=True):
            sizes = [int(n) for n in seeds[0]["kept"]]
            for shift, (name, color, marker) in zip((-0.01, 0, 0.01), STYLES, strict=True):
                stats = [
                    common.mean_and_interval([s["kept"][str(n)][name] for s in seeds])
                    for n in sizes
                ]
                means, halves = zip(*stats, strict=True)
                x = np.asarray(sizes) + shift * max(sizes)  # so that the bars stand apart
                ax.errorbar(x, means, halves, color=color, marker=marker, capsize=2, label=name)
            ax.set(title=TITLES[kind], xlabel="ingredients", ylabel="test accuracy, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        self._save(figure, folder / "paper_cost_curve.svg")

    @staticmethod
    def _save(figure: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)

    def commands(self) -> str:
        header = ["command", "seeds", "processor minutes"]
        rows = [
            [
                f"``python -m benchmarks paper.{name}``",
                ", ".join(map(str, run["seeds"])),
                f"{run['minutes']}",
            ]
            for name, run in sorted(self.found.items())
            if name != "everything"
        ]
        whole = self.found["everything"]
        return table(header, rows) + (
            f"\n``make paper`` makes all of it but the defaults (``make paper-defaults``). From "
            f"nothing it took {whole['elapsed']:.0f} minutes with {whole['jobs']} processes of a "
            f"thread each; {whole['minutes']:.0f} processor minutes of that made the zoos."
        )

    def text(self) -> str:
        template = (Path(__file__).parent / "page.rst.in").read_text(encoding="utf-8")
        for name in ("commands", "accuracy", "cost", "removed", "curve", "outside", "ablations",
                     "batch_norm", "defaults", "diverged", "claims"):  # fmt: skip
            template = template.replace(f"@{name}@", getattr(self, name)().strip())
        return template


def _percent(shares: Iterable[float]) -> str:
    return f"{100 * statistics.mean(shares):.1f} %"


def base_of(name: str) -> str:
    """What a variant of the ablations is compared with."""
    return name.replace("plain weights", "differences") if name.startswith("script") else "as it is"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    options = parser.parse_args()
    page = Page(options.results)
    (options.docs / "paper.rst").write_text(page.text(), encoding="utf-8")
    README.write_text(page.readme(), encoding="utf-8")
    page.draw(options.docs / "images")


if __name__ == "__main__":
    main()
