"""What a search has found: table, console, plots, best configuration."""
