"""Listens to a model's own forward, and hands its queries, keys and log-sum-exp to the statistics."""
