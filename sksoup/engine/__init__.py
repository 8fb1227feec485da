"""A module and rows -> loss, gradient with respect to coefficients, score."""
