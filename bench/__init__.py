"""The benches. From the root of the checkout: python -m bench.gpu, python -m bench.kernels.run, and so on.

The folders below are packages without an __init__.py where they need none. bench/kernels must not have one: Hugging
Face's package is called kernels, too, and `python bench/gpu.py` puts this folder first on the path.
"""
