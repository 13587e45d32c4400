"""Leaving PyTorch: writing a graph as ONNX, and checking what onnxruntime makes of the file.

`onnx` writes, `sessions` opens a file on one provider, `probe` measures in a fresh process, `runtime`
compares with the module, `report` prints it. onnx and onnxruntime are imported inside functions, so `import
splitfx` stays light.
"""
