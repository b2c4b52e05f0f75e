"""The accelerator, DDP and FSDP2, what processes do together, and signals."""
