"""Draw docs/_static/card.png, the picture of link previews: python docs/make_card.py."""

from pathlib import Path

import matplotlib.pyplot as plt

BLUE, ORANGE = "#0072b2", "#d55e00"

figure = plt.figure(figsize=(12, 6.3), dpi=100)
axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 12), ylim=(0, 6.3))
axes.axis("off")
axes.text(0.7, 4.6, "sksoup", fontsize=72, weight="bold", color=BLUE, va="center")
axes.text(
    0.7, 2.7, "Average the weights of your\nfine-tuned checkpoints\ninto one better model",
    fontsize=32, va="center", linespacing=1.4,
)  # fmt: skip
axes.text(
    0.7, 0.9, "model soups as scikit-learn estimators over PyTorch", fontsize=20, color="#555"
)
for k in range(5):
    y = 5.2 - k
    axes.annotate("", (10.5, 3.2), (9, y), arrowprops={"arrowstyle": "-", "color": "#999", "lw": 2})
    axes.plot(9, y, "s", ms=26, color=BLUE, alpha=0.45 + 0.1 * k)
axes.plot(10.5, 3.2, "o", ms=60, color=ORANGE)
figure.savefig(Path(__file__).parent / "_static" / "card.png")
