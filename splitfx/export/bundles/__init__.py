"""Folders of ONNX files that belong together: the branches of a carved model, the models of a sub-network graph."""
