"""The papers' experiments, and the page that shows what they measured."""
