"""Rhythm credit inside other trainers, a module for each. The package imports none of them by itself."""
