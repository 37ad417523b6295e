"""The operators' implementations in a form that exports: loops over chunks in place of Python's."""
