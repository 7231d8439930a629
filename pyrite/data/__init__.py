"""Rows of text: files, formats, tokens and templates, preference dimensions. It knows no model."""
