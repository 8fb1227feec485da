"""A fitted soup -> pictures and a page."""
