"""Acceptance length by real speculative decoding."""
