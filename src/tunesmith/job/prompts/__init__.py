"""Chat templates, as served and as trained: that they say the same."""
