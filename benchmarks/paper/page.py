"""The docs' page of the papers' tables, and README's figure and results, from the result files.

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

from . import common, families
from .families import BEST, BLUE, GREEN, GREY, ORANGE, SHIFT_TITLES, TITLES, verdict

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
CENTERED, CENTERED_PLUS = "Centered-Soup", "Centered-Soup+"
SYSTEMS = (*PAPER, CENTERED, CENTERED_PLUS)
PAPER_REMOVED = {  # of 72: share removed -> Greedy-Soup, MEHL-Soup+
    "0": ("81.03", "81.62"),
    "2": ("80.78", "81.58"),
    "22": ("80.08", "81.44"),
    "42": ("79.70", "81.01"),
}
PAPER_MARGIN = 1.24  # of MEHL-Soup+ over the best checkpoint
PLUS = "MEHL-Soup+"
RIVALS = ("Best checkpoint", "Greedy-Soup", "Learned-Soup+", "HL-Soup+", "Ensemble")
PHOTOS = ("photos", "photos-vit")
SHIFTED_TEXTS = (
    " Texts are shifted in two ways: typing errors in 5 or 15 % of the letters, and second or "
    "third paragraphs\nof docstrings instead of first ones."
)
STATEMENTS = "paper_statements.txt"  # included by pages of the docs
README = Path(__file__).parents[2] / "README.md"
# around what is made by this script
BEGIN, END = "<!-- results, made by python -m benchmarks paper.page: -->", "<!-- end of results -->"
AMOUNTS = {"rows": "validation examples", "ingredients": "ingredients"}
AMOUNT_STYLES = (
    ("Greedy-Soup", ORANGE, "^"), ("Centered-Soup", BLUE, "o"), ("Centered-Soup+", GREEN, "D"),
)  # fmt: skip
STYLES = (
    ("Best checkpoint", GREY, "s"), ("Greedy-Soup", ORANGE, "^"), (PLUS, BLUE, "o"),
    (CENTERED_PLUS, GREEN, "D"),
)  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    lines = [f".. list-table:: {title}".rstrip(), "    :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"    {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def pm(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95 % confidence interval, as text."""
    mean, half = common.mean_and_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def signed(values: Sequence[float], digits: int = 2) -> str:
    mean, half = common.mean_and_interval(values)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def cell(values: Sequence[float | None], show: Callable[[Sequence[float]], str]) -> str:
    """Show the values; a search that diverged has none."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"diverged on {len(values) - len(there)} of {len(values)} seeds"
    return show(there)


def paired(
    seeds: Sequence[Mapping[str, Any]], one: str, other: str, measure: str = "test"
) -> list[float | None]:
    """Difference of two systems, seed by seed."""
    return [
        seed[one][measure] - seed[other][measure] if seed[one] and seed[other] else None
        for seed in seeds
    ]


def beside_best(
    seeds: Sequence[Mapping[str, Any]], digits: Mapping[str, int], after: int
) -> list[list[str]]:
    """A row for each system: its measures, and after some its gain over the best checkpoint."""
    rows = []
    for name in seeds[0]:
        own = [seed[name] for seed in seeds]
        means = [
            cell([one and one[measure] for one in own], lambda values, d=d: pm(values, d))
            for measure, d in digits.items()
        ]
        gain = cell(paired(seeds, name, "Best checkpoint"), signed)
        rows.append([name, *means[:after], gain, *means[after:]])
    return rows


def shifted(tests: Mapping[str, Mapping[str, float]], measure: str) -> float:
    """The mean over all test sets but the clean one."""
    return statistics.mean(found[measure] for name, found in tests.items() if name != "clean")


def clean(tests: Mapping[str, Mapping[str, float]], measure: str) -> float:
    return tests["clean"][measure]


def worst(tests: Mapping[str, Mapping[str, float]], measure: str) -> float:
    return min(found[measure] for found in tests.values())


SHIFT_COLUMNS: dict[str, tuple[Callable[..., float], str, int]] = {
    "clean, %": (clean, "accuracy", 2), "shifted, %": (shifted, "accuracy", 2),
    "worst, %": (worst, "accuracy", 2), "log-loss": (clean, "log_loss", 3),
    "shifted log-loss": (shifted, "log_loss", 3), "calibration error": (clean, "calibration", 3),
    "shifted": (shifted, "calibration", 3),
}  # fmt: skip
SHIFT_GAINS = {
    f"{which} – {rival}": (of, rival)
    for rival in ("Best checkpoint", "Greedy-Soup")
    for which, of in (("clean", clean), ("shifted", shifted))
}


def shift_scores(systems: Sequence[Mapping[str, Any]]) -> Iterable[list[str]]:
    """A row for each system: its scores, over the splits."""
    for name in systems[0]:
        own = [one[name] for one in systems]
        yield [name, *(
            cell([one and of(one["tests"], measure) for one in own], lambda v, d=digits: pm(v, d))
            for of, measure, digits in SHIFT_COLUMNS.values()
        )]  # fmt: skip


def shift_gains(
    systems: Sequence[Mapping[str, Any]], memory: Mapping[str, float] | None = None
) -> Iterable[list[str]]:
    """A row for each system: what it gains over the rivals, paired by split, and its cost."""
    for name in systems[0]:
        gains = [
            cell([one[name] and of(one[name]["tests"], "accuracy") - of(one[rival]["tests"],
                  "accuracy") for one in systems], signed)
            for of, rival in SHIFT_GAINS.values()
        ]  # fmt: skip
        cost = [
            cell([one[name] and one[name][what] for one in systems], lambda v: f"{mean_of(v):.0f}")
            for what in ("seconds", "forward", "backward")
        ]
        if memory is not None:
            cost.append(f"{memory[name]:.1f}" if name in memory else "–")
        yield [name, *gains, *cost]


SHIFT_CLAIMS = (  # system, rival, points
    *((PLUS, rival, 0.0) for rival in RIVALS),
    (CENTERED_PLUS, "Best checkpoint", 1.2), (CENTERED_PLUS, "Greedy-Soup", 0.6),
    (CENTERED_PLUS, "Ensemble", 0.0), (CENTERED_PLUS, "Pruned-Soup", 0.0),
    (CENTERED_PLUS, "Model Stock", 0.0), ("Ensemble", "Best checkpoint", 0.5),
    ("Greedy-Soup", "Best checkpoint", 0.0), ("Pruned-Soup", "Greedy-Soup", 0.0),
    ("Model Stock", "Uniform-Soup", 0.0), ("WiSE-FT, best t", CENTERED_PLUS, 0.0),
)  # fmt: skip


def shift_claims(systems: Sequence[Mapping[str, Any]]) -> Iterable[list[str]]:
    """What one system gains over another, in points, clean and shifted, with a verdict each."""
    for name, rival, least in SHIFT_CLAIMS:
        gains = [
            [one[name] and one[rival] and
             of(one[name]["tests"], "accuracy") - of(one[rival]["tests"], "accuracy")
             for one in systems]
            for of in (clean, shifted)
        ]  # fmt: skip
        by = f" by {least} points" if least else ""
        cells = [cell(values, lambda v, least=least: verdict(v, least)) for values in gains]
        yield [f"{name} is above {rival}{by}", *cells]


def below_greedy(systems: Sequence[Mapping[str, Any]], name: str = CENTERED_PLUS) -> list[str]:
    """The test sets on which a system is below Greedy-Soup by more than the interval."""
    found = []
    for test in systems[0][name]["tests"]:
        mean, half = common.mean_and_interval(
            [one[name]["tests"][test]["accuracy"] - one["Greedy-Soup"]["tests"][test]["accuracy"]
             for one in systems]
        )  # fmt: skip
        if mean < -half:
            found.append(f"{test} ({mean:+.2f} ± {half:.2f})")
    return found


def amount_gains(seeds: Sequence[Mapping[str, Any]], what: str, n: str, name: str) -> list[float]:
    """Points over the best checkpoint with n validation examples or ingredients, by seed."""
    return [seed[what][n][name] - seed[what][n][BEST] for seed in seeds]


def mean_of(values: Iterable[float | None]) -> float:
    """The mean of those that did not diverge."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else float("nan")


def memory(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Of the seeds it was measured with."""
    measured = [seed["extra_memory"] for seed in seeds if seed["extra_memory"] is not None]
    return f"{statistics.mean(measured):.1f}" if measured else "–"


class Page:
    """The results of all experiments, as tables and statements."""

    def __init__(self, results: Path) -> None:
        self.found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
        self.ten = self.found["tables_1_2"]["results"]
        self.kinds = [kind for kind in TITLES if kind in self.ten]
        self.families = families.families(self.found)

    def test(self, kind: str, system: str) -> list[float]:
        return [100 * seed["systems"][system]["test"] for seed in self.ten[kind]]

    def gain(self, kind: str, rival: str, system: str = PLUS) -> list[float]:
        """Paired by seed."""
        return [a - b for a, b in zip(self.test(kind, system), self.test(kind, rival), strict=True)]

    def all_gains(self, rival: str, system: str = PLUS) -> list[float]:
        """The mean over the zoos of each seed: seeds are what varies."""
        return [statistics.mean(gains) for gains in zip(
            *(self.gain(kind, rival, system) for kind in self.kinds), strict=True)]  # fmt: skip

    def loss(self, kind: str, system: str, part: str = "log_loss") -> list[float]:
        return [seed["systems"][system][part] for seed in self.ten[kind]]

    def loss_gain(self, kind: str, rival: str) -> list[float]:
        """How much lower the test log-loss of Centered-Soup+ is."""
        pairs = zip(self.loss(kind, CENTERED_PLUS), self.loss(kind, rival), strict=True)
        return [theirs - ours for ours, theirs in pairs]

    # ------------------------------------------------------------ sections

    def accuracy(self) -> str:
        rows = [
            [
                system,
                *(pm(self.test(kind, system)) for kind in self.kinds),
                PAPER.get(system, ("–",))[0],
            ]
            for system in SYSTEMS
        ]
        header = ["system", *(TITLES[kind] for kind in self.kinds), "ImageNet, ViT-B/32 (paper)"]
        gains = [
            [f"over {rival}", *(signed(self.gain(kind, rival)) for kind in self.kinds),
             signed(self.all_gains(rival)),
             f"{float(PAPER[PLUS][0]) - float(PAPER[rival][0]):+.2f}"]
            for rival in RIVALS
        ]  # fmt: skip
        centered = [
            [f"over {rival}", *(signed(self.gain(kind, rival, CENTERED_PLUS))
             for kind in self.kinds), signed(self.all_gains(rival, CENTERED_PLUS))]
            for rival in (*RIVALS, PLUS)
        ]  # fmt: skip
        return "\n".join([
            table(header, rows),
            f"What {PLUS} gains, in points, paired by seed:\n",
            table(["", *header[1:-1], "mean", "paper"], gains),
            f"What {CENTERED_PLUS} gains:\n",
            table(["", *header[1:-1], "mean"], centered),
        ])  # fmt: skip

    def log_loss(self) -> str:
        """Cross-entropy on the test data, and on the validation data."""
        header = ["system", *(TITLES[kind] for kind in self.kinds)]
        return "\n".join(
            table(header, [[system, *(pm(self.loss(kind, system, part), 3) for kind in self.kinds)]
                           for system in SYSTEMS], title)
            for part, title in (("log_loss", "Test data"), ("held_out_log_loss", "Validation data"))
        )  # fmt: skip

    def statements(self) -> str:
        """One statement for each claim, as a list in reStructuredText; pages include it."""
        lines = families.statements(self.families).values()
        return "".join(f"* {line.replace('`', '``')}\n" for line in lines)

    def readme(self) -> str:
        """README with the results of these files: a table, and what it is of."""
        best, paper = (
            families.worst_seed(self.families, system)
            for system in (families.DEFAULT, families.PAPER_FORM)
        )
        lines = [
            families.readme_table(self.families),
            f"\nEach row counts the families of models in which a method is better or worse than "
            f"another, and by how much. A family is one network of 57,000 to 22 million "
            f"parameters, fine-tuned 12 to 48 times from one start. Differences are in points of "
            f"test accuracy if no perplexity is named, and paired, with 95 % intervals over "
            f"{families.seeds_of(self.families)} seeds. For ConvNet, ViT and ResNet, a seed "
            f"changes data and training; for others, only the split into validation and test data. "
            f"*Inconclusive*: the interval contains 0. On its worst seed, "
            f"`MEHLSoup(layerwise=True)` differs from the best checkpoint by {best}, and with its "
            f"paper's settings by {paper}. [All results](docs/paper.rst)",
        ]
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        return "\n".join([before + BEGIN, *lines, END + after])

    def cost(self) -> str:
        rows = []
        for system in SYSTEMS:
            paper = PAPER.get(system, ("–", "–", "–"))
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
                paper[1],
                paper[2],
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
                gains = [
                    signed([a - b for a, b in
                            zip(by_system[system], by_system["Greedy-Soup"], strict=True)])
                    for system in (PLUS, CENTERED_PLUS)
                ]  # fmt: skip
                rows.append([n, *(pm(values) for values in by_system.values()), *gains])
            parts.append(table(["removed", *by_system, *(f"{system} over Greedy-Soup" for system in
                                (PLUS, CENTERED_PLUS))], rows, TITLES[kind]))  # fmt: skip
        rows = [[n, *values] for n, values in PAPER_REMOVED.items()]
        parts.append(table(["removed of 72", "Greedy-Soup", PLUS], rows, "The paper, ImageNet"))
        return "\n".join(parts)

    def curve(self) -> str:
        """Test accuracy against the number of ingredients."""
        found, rows = self.found["table_3"]["results"], []
        for kind, seeds in found.items():
            for system in ("Greedy-Soup", PLUS, CENTERED_PLUS):
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
            [system, *(pm([s[system][policy] for s in seeds]) for policy in policies),
             signed([s[system]["recalibrate"] - s[system]["average"] for s in seeds])]
            for system in seeds[0]
        ]  # fmt: skip
        return table(["system", *policies, "recalibrate – average"], rows)

    def defaults(self) -> str:
        found = self.found["defaults"]["results"]
        seeds = [seed for some in found.values() for seed in some]
        base, *rest = seeds[0]["clean"]

        def mean(name: str, condition: str, measure: str) -> float:
            """NaN for what was not measured with ruined ingredients."""
            found = [s[condition].get(name) for s in seeds]
            return mean_of(one and one[measure] for one in found)

        columns = [
            (condition, measure, digits)
            for condition in ("clean", "ruined")
            for measure, digits in (("test", 2), ("log_loss", 4), ("passes", 1))
        ]
        names = sorted([base, *rest], key=lambda name: -mean(name, "clean", "test"))
        rows = [
            [name, *(f"{mean(name, condition, measure):.{digits}f}".replace("nan", "–")
                     for condition, measure, digits in columns),
             *(cell(paired([s[condition] for s in seeds], name, base), signed)
               if name in seeds[0][condition] else "–" for condition in ("clean", "ruined"))]
            for name in names
        ]  # fmt: skip
        words = {"test": "accuracy, %", "log_loss": "log-loss", "passes": "passes"}
        header = ["variant", *(f"{condition}: {words[name]}" for condition, name, _ in columns),
                  "clean: difference", "ruined: difference"]  # fmt: skip
        zoos = ", ".join(TITLES[kind] for kind in found)

        def with_few(n: str, name: str, measure: str) -> float:
            return mean_of(s["rows"][n][name] and s["rows"][n][name][measure] for s in seeds)

        few = [
            [f"{n}, {name}", f"{with_few(n, name, 'test'):.2f}",
             f"{with_few(n, name, 'log_loss'):.4f}"]
            for n in seeds[0]["rows"] for name in seeds[0]["rows"][n]
        ]  # fmt: skip
        return "\n".join([
            f"Means over the zoos {zoos} and their seeds:\n", table(header, rows),
            "With few validation examples:\n",
            table(["examples, system", "accuracy, %", "log-loss"], few),
        ])  # fmt: skip

    def diverged(self) -> str:
        seeds = self.found["diverged"]["results"]["diverged"]
        rows = [[name, cell([s["test"][name] for s in seeds], pm)] for name in seeds[0]["test"]]
        failed = [name for s in seeds for name in s["failed"] if name in s["named"]]
        wrong = [name for s in seeds for name in s["named"] if name not in s["failed"]]
        n_failed = sum(len(s["failed"]) for s in seeds)
        gains = [s["over_greedy"] for s in seeds]
        worst = min(gains, key=lambda gain: gain["mean"])
        return "\n".join([
            table(["recipe", "test accuracy, %"], rows),
            f"The difference of {CENTERED_PLUS} from Greedy-Soup, paired by seed, is "
            f"{signed([gain['mean'] for gain in gains])} points; on its worst seed "
            f"{worst['mean']:+.2f}, with a standard error over the test examples of "
            f"{worst['standard_error']:.2f}.\n",
            f"Before its search {PLUS} warned and named {len(failed)} of the {n_failed} failed "
            f"ingredients of all seeds, and {len(wrong)} that had not failed. The last row leaves "
            f"out those that were named.",
        ])  # fmt: skip

    def failures(self) -> str:
        parts, below = [], []
        for kind, seeds in self.found["failures"]["results"].items():
            others = [name for name in seeds[0]["none"] if name != "Greedy-Soup"]
            rows = []
            for failure in seeds[0]:
                some = [seed[failure] for seed in seeds]
                gains = {name: paired(some, name, "Greedy-Soup") for name in others}
                greedy = [s["Greedy-Soup"] and s["Greedy-Soup"]["test"] for s in some]
                rows.append([failure, cell(greedy, pm),
                             *(cell(gains[name], signed) for name in others)])  # fmt: skip
                mean = mean_of(gains[CENTERED_PLUS])
                if not mean >= -0.5:
                    below.append(f"{TITLES[kind]}, {failure} ({mean:+.2f})")
            header = ["failure", "Greedy-Soup, %", *(f"{name} over it" for name in others)]
            parts.append(table(header, rows, TITLES[kind]))
        where = "; ".join(below) or "none"
        parts.append(f"Failures with which {CENTERED_PLUS} is on average more than 0.5 points "
                     f"below Greedy-Soup: {where}.")  # fmt: skip
        return "\n".join(parts)

    def few_rows(self) -> str:
        found = self.found["few_rows"]["results"]
        parts = []
        for kind, seeds in found.items():
            systems = list(next(iter(seeds[0].values())))
            against = [name for name in systems if name != "Greedy-Soup"]
            for measure, title, digits in (("test", "accuracy, %", 2), ("log_loss", "log-loss", 3)):
                rows = []
                for n in seeds[0]:
                    some = [seed[n] for seed in seeds]
                    means = [cell([s[name] and s[name][measure] for s in some],
                                  lambda values, d=digits: pm(values, d))
                             for name in systems]  # fmt: skip
                    gains = [cell(paired(some, name, "Greedy-Soup", measure),
                                  lambda values, d=digits: signed(values, d))
                             for name in against]  # fmt: skip
                    rows.append([n, *means, *gains])
                header = ["validation examples", *systems, *(f"{n} – Greedy-Soup" for n in against)]
                parts.append(table(header, rows, f"{TITLES[kind]}, test {title}"))
        parts.append(self._least_rows(found))
        return "\n".join(parts)

    def shift(self) -> str:
        """Clean and shifted test sets: the scores, and what is gained over two rivals."""
        if "shift" not in self.found:
            return ""
        parts, counted = [], self.found.get("shift_memory", {"results": {}})["results"]
        for kind, seeds in self.found["shift"]["results"].items():
            systems = [seed["systems"] for seed in seeds]
            (memory,) = counted.get(kind, [None])
            costs = ["seconds", "forward", "backward", *(["memory"] if memory else [])]
            title = f"{SHIFT_TITLES[kind]}, {len(seeds)} splits"
            below = "; ".join(below_greedy(systems)) or "none"
            parts += [
                table(["system", *SHIFT_COLUMNS], shift_scores(systems), title),
                table(["system", *SHIFT_GAINS, *costs], shift_gains(systems, memory),
                      f"{title}: gains in points, cost of the fit"),
                table(["claim", "clean", "shifted"], shift_claims(systems), f"{title}: claims"),
                f"Test sets on which {CENTERED_PLUS} is significantly below Greedy-Soup: "
                f"{below}.\n",
            ]  # fmt: skip
        kinds = set(self.found["shift"]["results"])
        others = "* The other networks are those above.\n" if kinds - set(PHOTOS) else ""
        texts = SHIFTED_TEXTS if "text" in kinds else ""
        template = _template("page_shift").replace("@shift@", "\n".join(parts))
        template = template.replace("@others@\n", others).replace("@texts@", texts)
        return template.replace("@amounts@", self.amounts()).rstrip()

    def amounts(self) -> str:
        """Gains with fewer validation examples, and with fewer ingredients."""
        if "amounts" not in self.found:
            return ""
        parts = [
            ".. image:: images/paper_amounts.svg\n    :alt: Gain over the best checkpoint against "
            "the number of validation examples and of ingredients\n    :width: 100%\n"
        ]
        for kind, seeds in self.found["amounts"]["results"].items():
            for what, title in AMOUNTS.items():
                rivals = [name for name in next(iter(seeds[0][what].values())) if name != BEST]
                rows = [
                    [n, pm([seed[what][n][BEST] for seed in seeds]),
                     *(signed(amount_gains(seeds, what, n, name)) for name in rivals)]
                    for n in seeds[0][what]
                ]  # fmt: skip
                header = [title, "best checkpoint, %", *(f"{name} – best" for name in rivals)]
                parts.append(table(header, rows, f"{SHIFT_TITLES[kind]}, {len(seeds)} splits"))
        return "\n".join(parts)

    def draw_amounts(self, folder: Path) -> None:
        if "amounts" not in self.found:
            return
        found = self.found["amounts"]["results"]
        figure, grid = plt.subplots(
            len(found), 2, figsize=(10, 3 * len(found)), layout="constrained", sharey="row",
            squeeze=False,
        )  # fmt: skip
        for axes, (kind, seeds) in zip(grid, found.items(), strict=True):
            for ax, (what, title) in zip(axes, AMOUNTS.items(), strict=True):
                sizes = list(seeds[0][what])
                for name, color, marker in AMOUNT_STYLES:
                    gains = [amount_gains(seeds, what, n, name) for n in sizes]
                    means, halves = zip(*map(common.mean_and_interval, gains), strict=True)
                    ax.errorbar(range(len(sizes)), means, halves, color=color, marker=marker,
                                capsize=2, label=name)  # fmt: skip
                ax.axhline(0, color=GREY, linewidth=0.8)
                ax.set_xticks(range(len(sizes)), sizes)
                ax.set(xlabel=title, title=SHIFT_TITLES[kind])
            axes[0].set_ylabel("points over the best checkpoint")
        grid[0, 0].legend(frameon=False)
        self._save(figure, folder / "paper_amounts.svg")

    def adapters(self) -> str:
        """Soups of LoRA adapters, and the alternatives to a soup."""
        if not {"adapters", "adapters_instead"} <= self.found.keys():
            return ""
        seeds = self.found["adapters"]["results"]["lora"]
        instead = self.found["adapters_instead"]["results"]["lora"]
        systems = [
            one["systems"] | other["systems"] for one, other in zip(seeds, instead, strict=True)
        ]
        rows = beside_best(systems, {"test": 2, "log_loss": 3, "seconds": 0}, after=1)
        header = ["system", "accuracy, %", "– best adapter", "log-loss", "seconds"]
        gap = max(seed["cat_differs_from_uniform_by"] for seed in instead)
        sizes = [seeds[0][name] / 2**20 for name in ("adapter_bytes", "model_bytes")]
        found = table(header, rows, f"{len(seeds)} splits, 16 adapters") + (
            f"\nThe 16 adapters take {sizes[0]:.1f} MiB together, one whole model {sizes[1]:.1f}. "
            f"The weights of peft's cat and of Uniform-Soup differ by {gap:.1g} at most.\n"
        )
        return _template("page_adapters").replace("@adapters@", found)

    def language(self) -> str:
        """Perplexities of soups of language models."""
        if "language" not in self.found:
            return ""
        parts = []
        titles = {"language": "All weights fine-tuned", "language-lora": "LoRA adapters"}
        for kind, seeds in self.found["language"]["results"].items():
            systems = [seed["systems"] for seed in seeds]
            rows = beside_best(systems, {"held_out": 2, "test": 2, "seconds": 0}, after=2)
            header = ["system", "validation perplexity", "test perplexity", "– best", "seconds"]
            parts.append(table(header, rows, f"{titles[kind]}, {len(seeds)} splits"))
        return _template("page_language").replace("@language@", "\n".join(parts))

    @staticmethod
    def _least_rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """From how many rows on Centered-Soup+ is at least level with every other system."""
        seeds = [seed for some in found.values() for seed in some]
        sizes = list(seeds[0])

        def is_level(n: str) -> bool:
            mean = {name: mean_of(s[n][name] and s[n][name]["test"] for s in seeds)
                    for name in seeds[0][n]}  # fmt: skip
            return all(mean[CENTERED_PLUS] >= value for value in mean.values() if value == value)

        level = [is_level(n) for n in sizes]
        if not level[-1]:
            return (f"With {sizes[-1]} examples another system has a higher mean test accuracy "
                    f"over the zoos than {CENTERED_PLUS}.")  # fmt: skip
        first = max((i + 1 for i, good in enumerate(level) if not good), default=0)
        return (f"With {sizes[first]} examples or more {CENTERED_PLUS} has the highest mean test "
                f"accuracy over the zoos.")  # fmt: skip

    # -------------------------------------------------------------- claims

    def claims(self) -> str:
        """The papers' claims, each measured on each zoo."""
        kinds, rows = self.kinds, []

        def claim(
            text: str,
            values: Callable[[str], list[float] | None],
            least: float = 0.0,
            digits: int = 2,
        ) -> None:
            cells, all_values = [], []
            for kind in kinds:
                found = values(kind)
                cells.append("–" if found is None else verdict(found, least, digits))
                if found is not None:
                    all_values.append(found)
            per_seed = [statistics.mean(v) for v in zip(*all_values, strict=True)]
            rows.append([text, *cells, verdict(per_seed, least, digits)])

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
        for rival in ("Greedy-Soup", PLUS):
            claim(f"{CENTERED_PLUS} is above {rival}",
                  lambda kind, r=rival: self.gain(kind, r, CENTERED_PLUS))  # fmt: skip
            claim(f"{CENTERED_PLUS} has a lower log-loss than {rival}",
                  lambda kind, r=rival: self.loss_gain(kind, r), digits=3)  # fmt: skip
        claim("Greedy-Soup is above the best checkpoint",
              lambda kind: [a - b for a, b in zip(self.test(kind, "Greedy-Soup"),
              self.test(kind, "Best checkpoint"), strict=True)])  # fmt: skip
        removed = self.found["table_3"]["results"]

        def lost(kind: str) -> list[float] | None:
            if kind not in removed:
                return None
            return [s["removed"][list(s["removed"])[-1]][PLUS] - s["removed"]["0"][PLUS]
                    for s in removed[kind]]  # fmt: skip

        def beats(kind: str, system: str = PLUS) -> list[float] | None:
            if kind not in removed:
                return None
            half = [s["removed"][list(s["removed"])[-1]] for s in removed[kind]]
            return [found[system] - found["Greedy-Soup"] for found in half]

        claim(f"{PLUS} keeps within 0.6 points without the better half", lost, -0.6)
        claim(f"without the better half {PLUS} beats Greedy-Soup by a point", beats, 1.0)
        claim(f"without the better half {CENTERED_PLUS} beats Greedy-Soup by a point",
              lambda kind: beats(kind, CENTERED_PLUS), 1.0)  # fmt: skip
        header = ["claim", *(TITLES[kind] for kind in kinds), "mean"]
        lines = [table(header, rows)]
        for column, name in enumerate(header[1:], start=1):
            cells = [row[column] for row in rows if row[column] != "–"]
            marks = [sum(cell.startswith(mark) for cell in cells) for mark in ("✓", "✗")]
            lines.append(
                f"* {name}: of {len(cells)} claims {marks[0]} hold, {marks[1]} do not, "
                f"{len(cells) - sum(marks)} are inconclusive."
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
            for shift, (name, color, marker) in zip((-0.01, 0, 0.01, 0.02), STYLES, strict=True):
                stats = [
                    common.mean_and_interval([s["kept"][str(n)][name] for s in seeds])
                    for n in sizes
                ]
                means, halves = zip(*stats, strict=True)
                x = np.asarray(sizes) + shift * max(sizes)  # so that the bars stand apart
                ax.errorbar(x, means, halves, color=color, marker=marker, capsize=2, label=name)
            ax.set(title=TITLES[kind], xlabel="ingredients", ylabel="test accuracy, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        self._save(figure, folder / "paper_cost_curve.svg")
        self.draw_amounts(folder)
        families.draw(self.families, folder / "hero.svg")

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
        ]
        return table(header, rows) + (
            "\n``make paper`` runs all of them and makes the zoos, except for the defaults "
            "(``make paper-defaults``)."
        )

    def text(self) -> str:
        template = _template("page")
        for name in ("commands", "accuracy", "log_loss", "cost", "removed", "curve", "outside",
                     "ablations", "batch_norm", "defaults", "diverged", "failures", "few_rows",
                     "shift", "adapters", "language", "claims"):  # fmt: skip
            template = template.replace(f"@{name}@", getattr(self, name)().strip())
        return template.rstrip() + "\n"


def _template(name: str) -> str:
    return (Path(__file__).parent / f"{name}.rst.in").read_text(encoding="utf-8")


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
    (options.docs / STATEMENTS).write_text(page.statements(), encoding="utf-8")
    README.write_text(page.readme(), encoding="utf-8")
    page.draw(options.docs / "images")


if __name__ == "__main__":
    main()
