"""Model families as data: configurations and tensor names."""
