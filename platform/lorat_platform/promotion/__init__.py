"""Which version is champion, and on what grounds."""
