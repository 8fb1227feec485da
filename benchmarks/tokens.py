"""A step on a language model against the bare step, with a vocabulary of 50,257.

    python -m benchmarks tokens [--rows 8] [--tokens 64] [--turns 9]

The bare step is transformers' own: ``module(**X, labels=y).loss.backward()``. The other is what a
search takes of a step beside its coefficients: the same forward pass, the loss of all labeled
tokens, the backward pass. Both take turns in one process; the ratio is the median of the turns'.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sksoup import CheckpointCollection
from sksoup.recipes.validation import prepare_problem


def in_turns(
    bare: Callable[[], None], ours: Callable[[], None], turns: int
) -> tuple[float, float, float]:
    """Median of the ratios of two runs that take turns, and the two medians in seconds."""
    found = []
    for _ in range(turns + 1):
        taken = []
        for run in (bare, ours):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        found.append((taken[1] / taken[0], *taken))
    ratio, first, second = map(statistics.median, zip(*found[1:], strict=True))  # one warms up
    return ratio, first, second


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4)).eval()
    ids = torch.randint(0, 50_257, (options.rows, options.tokens))
    X = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    problem = prepare_problem(
        CheckpointCollection([module, module]), X, ids.numpy(), task="language-modeling",
        batch_size=None, device="cpu",
    )  # fmt: skip
    batches = tuple(problem.data.batches(None))

    def bare() -> None:
        module.zero_grad()
        module(**X, labels=ids).loss.backward()

    def ours() -> None:
        problem.module.zero_grad()
        problem.objective.loss_and_backward(batches)

    ratio, seconds, _ = in_turns(bare, ours, options.turns)
    print(
        f"a step at {options.rows} x {options.tokens} tokens: {ratio:.3f} "
        f"times the bare one ({seconds:.2f} s)"
    )


if __name__ == "__main__":
    main()
