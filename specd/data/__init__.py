"""Training data: conversations into samples, samples into batches."""
