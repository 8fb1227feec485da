"""Make the reference zoo that comes with the package, and the list of its SHA-256 digests.

    python -m benchmarks reference_zoo [--out sksoup/reference_zoo]

The zoo of `sksoup.datasets.load_digits_checkpoints`: the 24 fine-tunings of
``make_digits_checkpoints(random_state=0)``, with weights rounded to the precision of bfloat16. They
stay float32, as demos compute in float32; the 16 bits that are zero disappear where the package is
compressed. Another machine makes other weights, which do as well: figures in README and in the docs
have to be made again after it (``python -m benchmarks paper.page``).
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import zlib
from pathlib import Path

import torch

from sksoup.checkpoints.write import write_safetensors, write_text
from sksoup.datasets import DIGESTS, REFERENCE, REFERENCE_SEED, make_digits_checkpoints


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """To the nearest number that bfloat16 holds, in the tensor's own dtype."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def write_zoo(source: Path, out: Path, n_checkpoints: int = 24) -> None:
    """Fine-tune into the folder ``source``, and write the rounded files and their digests."""
    zoo = make_digits_checkpoints(source, n_checkpoints, random_state=REFERENCE_SEED)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, checkpoint in zoo.checkpoints.items():
        path = out / f"{name}.safetensors"
        write_safetensors(path, {key: rounded(value) for key, value in checkpoint.items()})
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    write_text(out / DIGESTS, "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REFERENCE)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        write_zoo(Path(folder), out)
    files = [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]
    packed = sum(len(zlib.compress(content, 9)) for content in files)
    print(f"{len(files)} files, {sum(map(len, files)):,} bytes, {packed:,} compressed, in {out}")


if __name__ == "__main__":
    main()
