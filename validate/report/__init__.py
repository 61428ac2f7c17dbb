"""What validation measured, for people and for programs."""
