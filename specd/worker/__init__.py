"""The worker: the process that owns the target and the ring's memory."""
