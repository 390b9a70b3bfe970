"""What an exported folder takes along: each file runs there without this project."""
