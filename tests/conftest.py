"""Profiles of hypothesis: `python -m pytest tests/test_fuzz.py --hypothesis-profile=long` is the thorough one."""

from hypothesis import settings

settings.register_profile("long", max_examples=10_000)
