"""What someone who writes to the user's folders can try."""
