"""Odd inputs for everything that ditkit reads, made at random and again from a seed.

``python -m tests.fuzz`` says more. Each file in ``targets`` is one format."""
