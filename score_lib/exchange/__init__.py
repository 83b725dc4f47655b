"""Models in the layouts of other libraries, read and written."""
