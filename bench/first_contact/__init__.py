"""The parts of bench/gpu.py: `parts` lists them, `runner` runs them, `worker` is one process, `summary` reads them."""
