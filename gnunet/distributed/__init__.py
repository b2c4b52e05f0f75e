"""The accelerator, DDP and FSDP2, what processes do together, and signals.

A process that was launched as one of N trains as one of N or ends with an error, also if its launcher dies while it
starts. All N see the same examples whatever N is. On CPUs one process, and two by DDP or FSDP2, give the same bits in
every run, whether it was interrupted or not, as long as N stays the same. For more, or on GPUs, the order in which
gradients are summed is the library's (gloo, NCCL), and may change with a restart: results agree within rounding.
"""
