"""Compares credits over seeds: runs the grid of runs, or reads finished ones; the command line is in __main__."""
