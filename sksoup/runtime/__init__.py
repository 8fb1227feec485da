"""What runs underneath: results kept on disk, ranks, memory, random state."""
