"""NCCL point-to-point between any two GPUs."""
