"""Coefficients -> weights, and the record of what was mixed."""
