"""Listens to a model's forward, and passes its queries, keys and log-sum-exp to the statistics."""
