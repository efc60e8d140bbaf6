"""DFlash (arXiv 2602.06036): a block-diffusion draft that reads several of the target's layers."""
