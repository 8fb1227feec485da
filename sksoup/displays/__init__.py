"""Displays of fitted soups, in scikit-learn's convention, and their report in HTML."""
