"""What everything stands on: errors, files, processes, the input of a network."""
