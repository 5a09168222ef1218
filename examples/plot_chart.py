"""Plots chart.png with matplotlib: three coffees, each a marker with its name above and its score below."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COFFEES = [  # name, price, score, marker, its size, color
    ("Mocha", 2.1, 71, "o", 46, "#1f6f8b"),
    ("Lungo", 4.3, 85, "s", 42, "#a63d40"),
    ("Breve", 6.3, 64, "^", 48, "#4a7c36"),
]


def main() -> None:
    pyplot.rcParams["font.family"] = "Open Sans"
    figure, axes = pyplot.subplots(figsize=(6.4, 6.4), dpi=100)
    figure.subplots_adjust(left=0.06, right=0.97, top=0.84, bottom=0.15)
    for name, price, score, marker, size, color in COFFEES:
        axes.plot(price, score, marker, markersize=size, color=color)
        for text, side, anchor in ((name, 30, "bottom"), (str(score), -32, "top")):
            axes.annotate(
                text, (price, score), (0, side), textcoords="offset points", ha="center", va=anchor, fontsize=38
            )
    axes.set_title("Coffee test", fontsize=42, fontweight="bold", pad=16)
    axes.set_xlabel("Price", fontsize=38, labelpad=8)
    axes.set_xlim(0.6, 7.6)
    axes.set_ylim(47, 102)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_linewidth(3)
    figure.savefig(Path(__file__).with_name("chart.png"))


if __name__ == "__main__":
    main()
