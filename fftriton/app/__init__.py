"""The command line: `fftriton run` and `fftriton eval`."""
