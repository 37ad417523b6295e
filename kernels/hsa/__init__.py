"""Hierarchical sparse attention."""
