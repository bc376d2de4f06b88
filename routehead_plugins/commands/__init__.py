"""What the `routehead` commands do; cli.py says how they are called."""
