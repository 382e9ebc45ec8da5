"""The pool as one page to look at, and its figures."""
