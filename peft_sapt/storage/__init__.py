"""What lies on disk: the weights file that describes itself, folders of plain adapters, checkpoints, atomic writes."""
