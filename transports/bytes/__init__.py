"""Packed bytes over a second ZeroMQ socket: works anywhere."""
