"""A run's directory and its lock, checkpoints written atomically, trained models loaded from them, and exports."""
