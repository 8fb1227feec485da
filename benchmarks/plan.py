"""What a fit takes at any size, in closed form: bytes on a device, operations, traffic, reads.

    python -m benchmarks plan [--bandwidth 5e10] [--flops 2e14] [--disk 2e9] ...

For ViT-B/32, ViT-L/14 and language models of 7 and 70 billion parameters on 1, 8 and 64 devices.
Nothing is run: what a device, a network and a disk do per second is assumed, and the options change
it. The bytes and the numbers sent are those that the tests count on two and four ranks. How long
ranks wait for a shared disk comes from a simulation of the background reader.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

EPOCHS, BATCH, N = 5, 128, 25_600  # of a model batch, rows of a step, held-out rows
READS = 4.25  # of all files: check and rank, lengths, a quarter for the center, model batches, mix
WIDE, NARROW = 4, 2  # bytes of a number: of weights, and of deltas


@dataclass(frozen=True)
class Size:
    """A model, and how it is souped."""

    name: str
    n_parameters: float  # D
    n_layers: int  # L, rows of coefficients
    block: float  # parameters of the largest block, which is whole for the time of its pass
    positions: int  # that a weight meets in a row
    K: int
    b: int


SIZES = (
    Size("ViT-B/32", 87.8e6, 152, 7.1e6, 50, 72, 18),
    Size("ViT-L/14", 304e6, 296, 12.6e6, 257, 32, 8),
    Size("7B", 6.74e9, 291, 202e6, 512, 16, 4),
    Size("70B", 69.0e9, 723, 855e6, 512, 8, 1),
)


def held_bytes(size: Size, n: int, on_gpu: bool = True, delta_bytes: int = NARROW) -> float:
    """Bytes of a device with shards on n ranks: b deltas, soup, module and gradient, and a block.

    The block is gathered with its gradient; of one device nothing is gathered. The center is one
    more where it is not in the host's memory. Activations are not in it.
    """
    models = WIDE * (3 if on_gpu else 4) + delta_bytes * size.b
    gathered = 2 * WIDE * size.block if n > 1 else 0.0
    return models * size.n_parameters / n + gathered


def operations(size: Size) -> float:
    """Of a step: forward and backward, and the two passes over the deltas."""
    D = size.n_parameters
    return 6 * D * size.positions * BATCH + 4 * size.b * D


def sent_bytes(size: Size, n: int) -> tuple[float, float]:
    """Of a rank in a step: FSDP2's own (two gathers and a scatter), and what the soup adds."""
    share = (n - 1) / n
    return 3 * share * WIDE * size.n_parameters, 2 * share * WIDE * sent_numbers(
        size.b, size.n_layers
    )


def sent_numbers(b: int, n_layers: int) -> int:
    """That the ranks sum in a step: the gradient of the coefficients."""
    return b * n_layers


def read_bytes(size: Size, n: int) -> float:
    """Of a rank in a fit: its rows of all files (of two bytes a number), some times."""
    return READS * size.K * NARROW * size.n_parameters / n


def n_steps(size: Size) -> int:
    return -(-size.K // size.b) * EPOCHS * -(-N // BATCH)


def waited(n: int, n_reads: int, seconds: float, work: float, ahead: int) -> float:
    """Seconds that n ranks wait for a disk that serves one read at a time.

    Each rank needs ``n_reads`` of ``seconds`` each, with ``work`` seconds of steps after every one.
    Its reader has memory for ``ahead`` reads, which is free again when their steps begin; without
    any it reads when the steps before are done. The ranks work in step, as FSDP2 makes them.
    """
    done = end = idle = 0.0
    starts: list[float] = []
    for k in range(n_reads):
        may = end if ahead == 0 else starts[k - ahead] if k >= ahead else 0.0
        done = max(done, may) + n * seconds  # of all ranks, one after the other
        starts.append(max(done, end))
        idle += starts[k] - end
        end = starts[k] + work
    return idle


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flops", type=float, default=2e14, help="of a device, per second")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="bytes between ranks")
    parser.add_argument("--disk", type=float, default=2e9, help="bytes of a shared disk")
    options = parser.parse_args()
    print("model     K   b  devices   GB each   Tflop/step   sent GB/step   soup adds   read GB   "
          "steps   hours   waiting for the disk")  # fmt: skip
    for size in SIZES:
        for n in (1, 8, 64):
            own, added = sent_bytes(size, n)
            step = operations(size) / n / options.flops + own / options.bandwidth
            n_batches = -(-size.K // size.b)
            part = size.b * NARROW * size.n_parameters / n / options.disk
            idle = waited(n, n_batches, part, n_steps(size) / n_batches * step, ahead=1)
            hours = (n_steps(size) * step + idle) / 3600
            print(f"{size.name:8}{size.K:3}{size.b:4}{n:9}{held_bytes(size, n) / 1e9:10.1f}"
                  f"{operations(size) / 1e12:13.1f}{own / 1e9:15.2f}{added / 1e3:9.1f} kB"
                  f"{read_bytes(size, n) / 1e9:10.0f}{n_steps(size):8,}{hours:8.2f}"
                  f"{idle / 60:15.1f} min")  # fmt: skip


if __name__ == "__main__":
    main()
