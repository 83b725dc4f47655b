"""Inputs and processes that go wrong, and what must come of it."""
