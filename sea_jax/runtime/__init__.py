"""What keeps a run alive: files, checkpoints, processes, signals, numbers and the terminal."""
