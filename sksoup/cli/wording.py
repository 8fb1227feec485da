"""Messages of the package with the remedies of the command line, not those of Python."""

from __future__ import annotations

import re

# what a message advises in Python, and what to do on the command line; names in it may be very long
REMEDIES = (
    (r"[Ll]eave (it|them) out with collection\.drop\((\[\.\.\.\]|.{0,300}?['\"])\) or "
     r"collection\.healthy\(\)", r"--healthy leaves \1 out"),
    (r"Leave it out with collection\.drop\(.{0,300}?['\"]\), or leave out all such checkpoints "
     r"with collection\.healthy\(\)", "--healthy leaves out all such checkpoints"),
    (r"Leave soups out with collection\.drop\(\[\.\.\.\]\), and keep them", "Keep soups"),
    (r"See collection\.describe\(\) for details", "See `sksoup inspect`"),
    (r" \(see held_out_scores_\)", ""),
    (r"path_ lists all of them; MEHLSoup learns", "`sksoup mehl` learns"),
    (r"which='all'", "--which all"),
    (r"classes=\[\.\.\.\]", "--classes"),
    (r", or pass forward=lambda module, X: .{0,300}$", "."),
)  # fmt: skip


def in_commands(message: str) -> str:
    """The message as a reader of the command line needs it."""
    for pattern, remedy in REMEDIES:
        message = re.sub(pattern, remedy, message)
    return message
