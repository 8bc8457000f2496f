"""Combine: the K weighted rows of every token, added in slot order."""
