"""
Stop and resume
===============

Fits a soup with ``memory=``. If it is killed and started again, it resumes::

    timeout --signal=KILL 6 python examples/fit_and_resume.py soup-memory
    python examples/fit_and_resume.py soup-memory
    python examples/fit_and_resume.py soup-memory

The second run gives the result of an uninterrupted run bit for bit; the third only loads it.
"""

import sys
from hashlib import sha256

from sksoup import MEHLSoup
from sksoup.datasets import make_digits_checkpoints

digits = make_digits_checkpoints()
soup = MEHLSoup(layerwise=True, model_batch_size=6, random_state=0, memory=sys.argv[1])
soup.fit(digits.checkpoints, digits.X_val, digits.y_val)

passes = soup.counts_.n_forward + soup.counts_.n_backward
print(f"{passes} passes, test accuracy {soup.score(digits.X_test, digits.y_test):.2f}")
print(sha256(soup.coef_.tobytes()).hexdigest())
