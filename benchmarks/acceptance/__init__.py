"""One command that shows what works and how fast on a GPU: `python -m benchmarks.acceptance --out DIR`."""
