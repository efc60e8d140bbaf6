"""Targets that run in SGLang, unmodified."""
