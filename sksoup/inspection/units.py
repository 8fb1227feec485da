"""How scores are written: in percent, as a perplexity, or as they are."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.tokens import perplexity

Interval = tuple[float, float]


@dataclass(frozen=True)
class Unit:
    """Scores as text; ``kind`` is "percent", "perplexity" or "plain"."""

    kind: str
    plus_minus: str = "±"

    @property
    def suffix(self) -> str:
        """What a heading ends with."""
        return {"percent": " %", "perplexity": " perplexity", "plain": ""}[self.kind]

    def score(self, score: float | None, spread: float | None = None) -> str:
        """A score, with its standard deviation; of a perplexity to first order."""
        if score is None:
            return "-"
        value = perplexity(score) if self.kind == "perplexity" else self._scaled(score)
        if spread is None:
            return self._number(value)
        if self.kind == "perplexity":
            return self._pair(self._number(value), value * spread)
        return self._pair(self._number(value), self._scaled(spread))

    def difference(
        self,
        value: float | None,
        interval: Interval | None,
        score: float | None,
        signed: bool = True,
    ) -> str:
        """A difference and half the width of its interval; ``score`` is the one that differs.

        That of perplexities has the interval to first order.
        """
        if value is None or score is None:
            return "-"
        half = None if interval is None else (interval[1] - interval[0]) / 2
        if self.kind == "perplexity":
            found = perplexity(score)
            change, half = found - perplexity(score - value), half and found * half
        else:
            change, half = self._scaled(value), half and self._scaled(half)
        text = self._number(change, "+" if signed else "")
        text = text if signed else text.lstrip("-")
        return text if half is None else self._pair(text, half)

    def in_words(self, value: float, interval: Interval | None, score: float, signed: bool) -> str:
        """A difference in a sentence."""
        unit = {"percent": " points", "perplexity": " in perplexity", "plain": ""}[self.kind]
        return self.difference(value, interval, score, signed) + unit

    def _scaled(self, score: float) -> float:
        return 100 * score if self.kind == "percent" else score

    def _number(self, value: float, sign: str = "") -> str:
        digits = {"percent": 2, "perplexity": 3, "plain": 4}[self.kind]
        return f"{value:{sign}.{digits}f}"

    def _pair(self, text: str, spread: float) -> str:
        return f"{text} {self.plus_minus} {self._number(spread)}"
