"""What can be configured: trainings, variants, and which values a field may have."""
