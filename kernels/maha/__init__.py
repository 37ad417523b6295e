"""Multiscale attention: scales of growing cells partition the past of every query."""
