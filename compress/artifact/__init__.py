"""The output folder: stages that appear whole or not at all, what vouches for them, and what a killed run goes on from."""
