"""The quality table: methods compressed and measured side by side (`python -m validate.quality`)."""
