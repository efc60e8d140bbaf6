"""The EAGLE-3 draft: one layer, trained on several of its own steps at once."""
