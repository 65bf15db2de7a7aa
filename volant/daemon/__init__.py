"""`volantd`: settings, the assembly of the tree, and its end."""
