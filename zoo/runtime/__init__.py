"""The serve wing's engine: requests, blocks, scheduling, sampling, sessions. Nothing here imports the build wing."""
