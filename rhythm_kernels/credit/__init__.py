"""Selects tokens and computes the factors of their advantages, with C++/CUDA ops or the same rules in torch ops."""
