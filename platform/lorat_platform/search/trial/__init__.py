"""One trial of a search, in one process or in a group of workers."""
