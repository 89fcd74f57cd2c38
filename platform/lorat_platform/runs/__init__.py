"""The folder of a run: its record, who drives it, its checkpoints."""
