"""From what a user has (images, regions, questions) to what the model reads (floor 2). Needs no model weights."""
