"""Benchmarks, one file a question, and the tools that they share. Each is run as `python -m benchmarks.NAME`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the repository."""
