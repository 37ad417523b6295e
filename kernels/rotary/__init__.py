"""Rotary positions of queries and keys."""
