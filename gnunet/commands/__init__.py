"""The subcommands of `gnunet`, one file each: `main(argv)` reads the arguments and returns the exit status."""
