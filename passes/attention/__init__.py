"""Passes that find standard softmax attention in a graph and rewrite it.

spellings  →  one canonical ``retrofit::attention`` node  →  a call of the site's target
"""
