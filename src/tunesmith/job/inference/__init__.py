"""A model loaded to answer, and the validation rows it is asked."""
