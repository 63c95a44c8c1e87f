"""The parts of bench/gpu.py: `parts` lists them, `session` runs them, `worker` is one process, `summary` reads them."""
