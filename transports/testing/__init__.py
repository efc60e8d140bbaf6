"""Conformance suites for transports, and processes to run them in: for plug-ins, `specd doctor` and benchmarks."""
