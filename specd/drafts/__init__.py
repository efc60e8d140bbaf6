"""Draft models: their networks, losses, drafters and published formats."""
