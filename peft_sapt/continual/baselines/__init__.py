"""Other methods of continual learning, each short, named after its paper, under the budget that all methods have."""
