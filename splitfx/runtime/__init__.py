"""What a model costs: predicted from shapes, or measured."""
