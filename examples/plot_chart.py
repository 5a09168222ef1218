"""Plots chart.png with matplotlib: four coffees, each a marker with its name above and its score below."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COFFEES = [  # name, price, score, marker, its size
    ("Mocha", 2.0, 71, "o", 22),
    ("Lungo", 3.4, 85, "s", 20),
    ("Breve", 5.1, 64, "^", 23),
    ("Cortado", 6.3, 92, "*", 30),
]
COLORS = ("#1f6f8b", "#a63d40", "#4a7c36", "#b7791f")


def main() -> None:
    pyplot.rcParams["font.family"] = "Open Sans"
    figure, axes = pyplot.subplots(figsize=(7.2, 6.4), dpi=100)
    for (name, price, score, marker, size), color in zip(COFFEES, COLORS, strict=True):
        axes.plot(price, score, marker, markersize=size, color=color)
        axes.annotate(name, (price, score), (0, 20), textcoords="offset points", ha="center", va="bottom", fontsize=22)
        axes.annotate(
            str(score), (price, score), (0, -20), textcoords="offset points", ha="center", va="top", fontsize=22
        )
    axes.set_title("Coffee test", fontsize=28, fontweight="bold", pad=14)
    axes.set_xlabel("Price", fontsize=22)
    axes.set_ylabel("Score", fontsize=22)
    axes.set_xlim(1, 7.5)
    axes.set_ylim(50, 108)
    axes.set_xticks([2, 4, 6])
    axes.set_yticks([60, 80, 100])
    axes.tick_params(labelsize=20)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("chart.png"))


if __name__ == "__main__":
    main()
