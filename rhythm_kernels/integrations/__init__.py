"""Rhythm credit inside other trainers: a module for each, none of which is imported before it is asked for."""
