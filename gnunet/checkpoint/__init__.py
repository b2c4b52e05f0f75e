"""A run's folder and its lock, checkpoints written atomically, models read back from them, and exports."""
