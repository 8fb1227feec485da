"""Files, folders, modules -> a collection of checkpoints, read tensor by tensor."""

from .collection import CheckpointCollection
from .describe import CheckpointSummary, CollectionSummary

__all__ = ["CheckpointCollection", "CheckpointSummary", "CollectionSummary"]
