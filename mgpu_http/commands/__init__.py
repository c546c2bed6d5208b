"""What the subcommands of `mgpu` do. Each takes the parsed arguments and gives the exit code."""
