"""Hidden states for the training loops of others: torch's data loaders, Speculators, SpecForge."""
