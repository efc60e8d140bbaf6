"""The training loop, exact resume, and what a run leaves on disk."""
