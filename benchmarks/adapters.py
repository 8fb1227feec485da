"""What a search in LoRA adapters costs: memory, a step, opening; and a plan for 7B parameters.

    python -m benchmarks adapters [--checkpoints 24] [--rank 8] [--rows 128] [--tokens 48]
    python -m benchmarks adapters --plan                 # counted, nothing is allocated

The network has the size of MiniLM-L6 (22.6 million parameters) and random weights; its adapters are
on all linear layers of the encoder, with heads of their own. Steps of the search and plain forward
and backward passes of the bare base take turns in one process; in the base all weights that the
search needs a gradient of have one. Tensors alive are counted one by one in a fit of HL-Soup+ over
all adapters, above the module, its gradient, the rows and the activations of a plain step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sksoup import CheckpointCollection, MEHLSoup, SoupWarning
from sksoup.checkpoints import read
from sksoup.engine.center import Anchor, centered
from sksoup.engine.low_rank import LowRankBatch
from sksoup.recipes.validation import prepare_problem
from sksoup.runtime.live_tensors import LiveTensors

from .tokens import in_turns

LINEAR = ["query", "key", "value", "dense"]
N_LABELS = 8


def build_base() -> nn.Module:
    """A classifier of MiniLM-L6's size, the same each time."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        num_labels=N_LABELS,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def write_adapters(folder: Path, n: int, rank: int, distinct: int = 24) -> list[Path]:
    """Write n PEFT folders; beyond ``distinct`` they are copies by other names."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = LoraConfig(r=rank, target_modules=LINEAR, modules_to_save=["classifier"])
    model = get_peft_model(build_base(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in trained]
    for k in range(min(n, distinct)):
        torch.manual_seed(k + 1)
        for parameter, start in zip(trained, first, strict=True):
            parameter.data.copy_(start + 0.02 * torch.randn_like(start))
        model.save_pretrained(str(folder / f"a{k:03}"))
    state = {n: v.contiguous() for n, v in get_peft_model_state_dict(model).items()}
    text = (folder / "a000/adapter_config.json").read_text()
    for k in range(distinct, n):
        (folder / f"a{k:03}").mkdir()
        (folder / f"a{k:03}/adapter_config.json").write_text(text)
        save_file(state, folder / f"a{k:03}/adapter_model.safetensors")
    return sorted(folder.iterdir())


def opening(paths: list[Path]) -> tuple[float, int]:
    """Seconds to open a collection of folders, and tensors that were read of them."""
    n_read = 0

    class Counting:
        """safe_open, counting the tensors that it gives."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file.__enter__()
            return self

        def __exit__(self, *raised: Any) -> None:
            self.file.__exit__(*raised)

        def __getattr__(self, name: str) -> Any:
            nonlocal n_read
            n_read += name == "get_tensor"
            return getattr(self.file, name)

    base = build_base()
    real, read.safe_open = read.safe_open, Counting  # type: ignore[assignment, misc]
    try:
        start = time.perf_counter()
        CheckpointCollection(paths, module=base)
        return time.perf_counter() - start, n_read
    finally:
        read.safe_open = real  # type: ignore[misc]


def draw_rows(n: int, tokens: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30_000, (n, tokens), generator=generator)
    X = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return X, torch.randint(0, N_LABELS, (n,), generator=generator)


def step_ratio(
    checkpoints: CheckpointCollection, X: Any, y: torch.Tensor, turns: int
) -> tuple[float, float, float]:
    """A step of the search over a bare one: median of the ratios, and the two medians."""
    problem = prepare_problem(
        checkpoints, X, y.numpy(), None, task="classification", classes=None, criterion=None,
        forward=None, layerwise=True, batch_size=len(y), device="cpu", precision="fp32",
        compile=False, cache=None, progress=lambda name, n: None,
    )  # fmt: skip
    batches = list(problem.data.batches(len(y)))
    with centered(problem, Anchor.mean(len(checkpoints))) as center:
        assert center is not None
        deltas = LowRankBatch(center, center.flat.weights.dtype)
        deltas.load(checkpoints.names)
        coef = torch.zeros(len(checkpoints), problem.layers.n_searched, dtype=torch.float64)

        def plain() -> None:
            center.flat.grad.zero_()
            problem.objective.loss_and_backward(tuple(batches), None)

        def searched() -> None:
            deltas.combine(coef)
            plain()
            deltas.project()

        return in_turns(plain, searched, turns)


def live_models(checkpoints: CheckpointCollection, X: Any, y: torch.Tensor) -> tuple[float, float]:
    """Tensors alive at once in a fit, in models, above the module's and a plain step; the factors.

    A plain step is counted in the same way: module, gradient, rows and activations.
    """
    adapters = checkpoints.on_one_base().values()
    factors = 4 * sum(one.n_numbers for one in adapters) / checkpoints.nbytes
    few = {name: value[:8] for name, value in X.items()}
    held = list(checkpoints.held_tensors())
    module = checkpoints.build_module()
    with LiveTensors(ignored=[*held, *module.state_dict().values()]) as live:
        output = module(**few).logits
        nn.functional.cross_entropy(output, y[:8]).backward()
        del output
    plain = live.peak + sum(p.nbytes for p in module.parameters())
    del module
    soup = MEHLSoup(
        checkpoints, layerwise=True, center="mean", clip_deltas=None, weight_decay=0,
        model_batch_size=None, max_epochs=1, batch_size=8, random_state=0, device="cpu",
    )  # fmt: skip
    with LiveTensors(ignored=held) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", SoupWarning)
        soup.fit(few, y[:8].numpy())
    return (live.peak - plain) / checkpoints.nbytes, factors


# ------------------------------------------------------------------------------- the plan


def counted(
    layers: int, width: int, inner: int, vocabulary: int, rank: int, n: int
) -> dict[str, int]:
    """Numbers in a decoder of Llama's kind, and in n adapters on its blocks' linear layers."""
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    targeted = layers * sum(a * b for a, b in shapes)
    return {
        "targeted": targeted,
        "all": targeted + 2 * vocabulary * width + (2 * layers + 1) * width,
        "factors": n * layers * rank * sum(a + b for a, b in shapes),
    }


def plan(layers: int, width: int, inner: int, vocabulary: int, rank: int, n: int) -> list[str]:
    """What is resident and what a step reads, for a decoder in bfloat16 with adapters."""
    numbers = counted(layers, width, inner, vocabulary, rank, n)
    targeted, size, factors = numbers["targeted"], numbers["all"], numbers["factors"]
    resident = {
        "module, float32 (computed in bfloat16 by autocast)": 4 * size,
        "gradient of the weights with factors, float32": 4 * targeted,
        "base of the weights with factors, bfloat16": 2 * targeted,
        f"factors of {n} adapters, bfloat16 (delta_dtype)": 2 * factors,
    }
    of_step = {
        "combine reads base and factors, writes weights": 2 * targeted + 2 * factors + 4 * targeted,
        "project reads gradient and factors": 4 * targeted + 2 * factors,
    }
    operations = 4 * n * rank  # of each weight with factors: two products
    return [
        f"{size / 1e9:.2f} billion parameters, {targeted / 1e9:.2f} billion of them with factors",
        f"of rank {rank}; {n} adapters of {2 * factors / n / 2**20:,.0f} MiB",
        "",
        "resident, GiB",
        *(f"  {b / 2**30:6.1f}  {what}" for what, b in resident.items()),
        f"  {sum(resident.values()) / 2**30:6.1f}  together, before activations",
        "",
        "read or written by a step beside forward and backward, GiB",
        *(f"  {b / 2**30:6.1f}  {what}" for what, b in of_step.items()),
        "",
        "operations of a step beside forward and backward",
        f"  {operations:6,}  per weight with factors, as much as {operations / 6:,.0f} tokens take",
        "",
        "the base is read once to build the module, once for the center, once to be kept, once",
        "for its SHA-256 and once per mix; once for each adapter where checkpoints are ranked",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args()
    if options.plan:
        print("\n".join(plan(32, 4096, 11_008, 32_000, 16, 72)))  # Llama-2 7B
        return
    X, y = draw_rows(options.rows, options.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_adapters(Path(temporary), max(200, options.checkpoints), options.rank)
        seconds, n_read = opening(paths[:200])
        print(f"opening 200 adapters: {seconds:.2f} s, {n_read} tensors read")
        checkpoints = CheckpointCollection(paths[: options.checkpoints], module=build_base)
        models, factors = live_models(checkpoints, X, y)
        print(
            f"HL-Soup+ over {len(checkpoints)} adapters of rank {options.rank}: {models:.2f} "
            f"models of tensors above module, gradient and a plain step; the factors are "
            f"{factors:.2f}"
        )
        ratio, bare, search = step_ratio(checkpoints, X, y, options.turns)
        print(
            f"a step at {options.rows} x {options.tokens} tokens: {ratio:.3f} times a plain one "
            f"({search:.2f} s and {bare:.2f} s)"
        )


if __name__ == "__main__":
    main()
