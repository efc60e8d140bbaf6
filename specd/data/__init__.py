"""Conversations into training samples, samples into batches."""
