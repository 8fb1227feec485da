"""The global random state stays as it was, in threads, too."""

from __future__ import annotations

import random
import threading

import numpy as np
import torch

from sksoup import CheckpointCollection
from sksoup.runtime.random_state import preserved_random_state


def draw():
    return torch.rand(()).item(), np.random.random(), random.random()


def seed():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)


def test_overlapping_contexts_restore_the_state_before_the_first():
    seed()
    expected = draw()
    seed()
    first, second = preserved_random_state(), preserved_random_state()
    first.__enter__()
    draw()
    second.__enter__()  # as another thread
    draw()
    first.__exit__(None, None, None)
    draw()
    second.__exit__(None, None, None)
    assert draw() == expected


def test_an_inner_context_restores_the_state_of_the_outer():
    seed()
    with preserved_random_state():
        expected = draw(), draw()
    with preserved_random_state():
        first = draw()
        with preserved_random_state():
            draw()
        assert (first, draw()) == expected


def test_eight_threads_build_and_read():
    states = [torch.nn.Linear(8, 8).state_dict() for _ in range(8)]
    together = threading.Barrier(8)

    def build():
        module = torch.nn.Linear(8, 8)  # draws
        if threading.current_thread() is not threading.main_thread():
            together.wait()  # so that all threads are at it
        return module

    collection = CheckpointCollection(states, module=build)

    def use(name):
        collection.build_module().load_state_dict(collection[name])

    for _ in range(5):  # which of them ends last is chance
        seed()
        expected = draw()
        seed()
        threads = [threading.Thread(target=use, args=(name,)) for name in collection]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert draw() == expected
