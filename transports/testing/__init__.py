"""What every transport must pass, and the processes to try it in: for plug-ins, `specd doctor` and the benchmarks."""
