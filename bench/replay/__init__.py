"""The benchmark of the replay tier: its lanes alone, and behind a daemon."""
