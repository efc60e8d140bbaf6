"""DFlash2: DFlash with convolutions inside a block and a walk through the best tokens of each place."""
