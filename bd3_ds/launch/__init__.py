"""Starting a run on one host or many, and starting it again."""
