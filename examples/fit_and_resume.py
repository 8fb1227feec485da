"""
Stop and resume
===============

Fits a soup with a memory. Killed at any time and started again, it goes on where it was::

    timeout --signal=KILL 6 python examples/fit_and_resume.py soup-memory
    python examples/fit_and_resume.py soup-memory
    python examples/fit_and_resume.py soup-memory

The second run ends with the bits that a run without interruption gives, the third runs no pass.
"""

import sys
from hashlib import sha256

from sksoup import MEHLSoup
from sksoup.datasets import make_digits_checkpoints

digits = make_digits_checkpoints()
soup = MEHLSoup(layerwise=True, model_batch_size=6, random_state=0, memory=sys.argv[1])
soup.fit(digits.checkpoints, digits.X_val, digits.y_val)

passes = soup.counts_.n_forward + soup.counts_.n_backward
print(f"{passes} passes, test accuracy {soup.score(digits.X_test, digits.y_test):.4f}")
print(sha256(soup.coef_.tobytes()).hexdigest())
