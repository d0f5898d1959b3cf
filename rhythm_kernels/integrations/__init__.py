"""Adds rhythm credit to other trainers, one module for each. The package itself imports none of them."""
