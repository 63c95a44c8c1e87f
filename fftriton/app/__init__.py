"""The command line: `fftriton run`, `fftriton batch` and `fftriton eval`."""
