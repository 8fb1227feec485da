"""Mix checkpoints with coefficients, and record how to rebuild the mix."""
