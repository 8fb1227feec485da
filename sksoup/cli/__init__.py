"""The command line: its options, the data files it reads, and what each command does."""
