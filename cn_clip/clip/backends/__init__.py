"""What runs the towers of a model: PyTorch, ONNX Runtime, OpenVINO or TensorRT, behind one protocol."""
