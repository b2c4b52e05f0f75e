"""Parts of soak.py."""
