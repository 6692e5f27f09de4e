"""What each ``zoo`` command does, given parsed arguments; ``zoo.cli`` holds the table."""
