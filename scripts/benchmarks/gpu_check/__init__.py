"""What gpu_check.sh runs, and a device for its rehearsal that computes nothing."""
