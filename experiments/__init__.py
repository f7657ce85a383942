"""Studies of what the method is worth; each script describes its command line."""
