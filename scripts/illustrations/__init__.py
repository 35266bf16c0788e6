"""Pictures for the documentation, drawn from what was measured and by the project's own functions."""
