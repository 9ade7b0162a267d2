"""What depends on the version of PyTorch: pyproject.toml allows several, and `make test-oldest` runs the lowest."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
shards_bytes = pytest.mark.skipif(TORCH < (2, 12), reason="FSDP2 of torch 2.11 shards floating parameters only")
