"""NCSNv2: all its techniques together."""
