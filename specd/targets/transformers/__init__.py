"""Targets that run in transformers."""
