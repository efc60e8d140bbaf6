"""The ring's memory: host segments, device memory, and all that specd asks of CUDA."""
