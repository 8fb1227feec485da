"""Collections of checkpoints from files, folders and modules, read one tensor at a time."""

from .collection import CheckpointCollection
from .describe import CheckpointSummary, CollectionSummary

__all__ = ["CheckpointCollection", "CheckpointSummary", "CollectionSummary"]
