"""The number of models that fit into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# by version of control groups: the folder of the controller, and its files for limit and usage
CGROUP_FILES = {
    2: ("", "memory.max", "memory.current"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


@dataclass(frozen=True)
class Budget:
    """What the memory has to hold: ``n_fixed`` whole models, and as many deltas as there is room.

    ``limit`` is in bytes; None is half of what the device has free.
    """

    limit: int | None
    model_bytes: int
    delta_bytes: int
    n_fixed: int
    device: torch.device

    def n_deltas(self) -> int:
        """Deltas that fit beside the fixed models; less than 1 where not even one does."""
        limit = free_bytes(self.device) // 2 if self.limit is None else self.limit
        return (limit - self.n_fixed * self.model_bytes) // max(self.delta_bytes, 1)

    def resolve(self, wanted: int | str | None, n_checkpoints: int) -> int:
        """The model batch: as asked, None for all, "auto" for what fits; never beyond a limit."""
        if wanted == "auto":
            b = min(max(self.n_deltas(), 1), n_checkpoints)
        else:
            b = n_checkpoints if wanted is None else min(int(wanted), n_checkpoints)
        if self.limit is not None and b > (fits := self.n_deltas()):
            needed = self.n_fixed * self.model_bytes + b * self.delta_bytes
            remedy = f"model_batch_size={fits} fits" if fits >= 1 else "not even 1 fits"
            raise ValueError(
                f"memory_limit={self.limit:,} bytes is too small for a model batch of {b}, which "
                f"needs {needed:,} bytes for {b} deltas of {self.delta_bytes:,} and {self.n_fixed} "
                f"models of {self.model_bytes:,}. Raise the limit; {remedy}."
            )
        return b


def parse_bytes(limit: int | str, what: str = "memory_limit") -> int:
    """Read a size: bytes, or a string such as "8GB"; ``what`` it is called in errors."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    if isinstance(limit, str):
        number, unit = limit.strip()[:-2], limit.strip()[-2:].upper()
        try:
            value = int(float(number) * units[unit])
        except (KeyError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{what}={limit!r} is not a size, expected bytes or a number with KB, MB, GB or "
                f"TB, such as '8GB'."
            ) from error
    else:
        value = int(limit)
    if value <= 0:
        raise ValueError(f"{what}={limit!r} must be positive.")
    return value


def free_bytes(device: torch.device) -> int:
    """Memory the device has free now; on the host within the limits of a container or a job."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        fields: Mapping[str, str] = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([free, *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """What each control group that the process is in leaves it, as containers and SLURM set it.

    Pages of files that can be dropped are free, as in the kernel's own ``MemAvailable``.
    """
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        mount, limit, usage = CGROUP_FILES[1 if controllers else 2]
        top = CGROUPS / mount
        here = top / path.strip("/")
        for group in (here, *(one for one in here.parents if one.is_relative_to(top))):
            try:  # a container sees its own group as the top; "max" is no limit
                free = int((group / limit).read_text()) - int((group / usage).read_text())
                counts = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
            except (OSError, ValueError):
                continue
            pages = counts.get("total_inactive_file", counts.get("inactive_file", 0))
            yield max(free + int(pages), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    phrases = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in phrases)
