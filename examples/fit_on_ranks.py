"""
Several GPUs and nodes
======================

Fits a soup with all processes of a torch.distributed job. For two processes on one machine::

    torchrun --nproc-per-node=2 examples/fit_on_ranks.py soup.safetensors

Each process computes part of every minibatch; only the gradients of the coefficients are summed.
"""

import sys
from datetime import timedelta

import torch
from torch import distributed

from sksoup import MEHLSoup
from sksoup.datasets import make_digits_checkpoints

distributed.init_process_group(
    "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=2)
)
digits = make_digits_checkpoints()
soup = MEHLSoup(layerwise=True, model_batch_size=6, random_state=0)
soup.fit(digits.checkpoints, digits.X_val, digits.y_val)
soup.save(sys.argv[1])  # only rank 0 writes

n_steps = sum(len(record["loss"]) for record in soup.history_)
sent = soup.counts_.n_reduced / n_steps
accuracy = soup.score(digits.X_test, digits.y_test)
print(
    f"rank {distributed.get_rank()} of {distributed.get_world_size()}: "
    f"{soup.counts_.rows_backward} rows, {sent:.0f} numbers sent a step, "
    f"test accuracy {accuracy:.2f}"
)
distributed.destroy_process_group()
