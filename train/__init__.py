"""A small GRPO trainer whose token credit follows the attention rhythm. Start it with `python -m train`."""
