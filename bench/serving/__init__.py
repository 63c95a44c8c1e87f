"""vLLM as a server, dense and with fftriton's plugin, under a mix of requests."""
