"""The order of the tutorials: each needs only what those before it have shown."""

from pathlib import Path

ORDER = (
    "plot_quickstart",
    "plot_will_they_mix",
    "plot_look_at_a_soup",
    "plot_your_model",
    "plot_your_data",
    "plot_fine_tune_and_soup",
    "plot_pipeline",
    "plot_grid_search",
    "plot_batch_norm",
)


def place(filename: str) -> int:
    """The place of an example in the gallery."""
    return ORDER.index(Path(filename).stem)
