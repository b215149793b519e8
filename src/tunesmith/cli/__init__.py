"""The verbs: each declared once in the module of its noun, collected in `table`."""
