"""What `tools/dev` does, one file a subject. Standard library only."""
