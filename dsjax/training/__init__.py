"""Optimizer, step, loop and what they report."""
