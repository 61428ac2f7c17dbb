"""What every command of this project does around its work: exit codes, messages, standard streams."""
