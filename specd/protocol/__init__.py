"""What a daemon and its trainers agree on: captures, batches and their layout, messages. No socket, no torch."""
