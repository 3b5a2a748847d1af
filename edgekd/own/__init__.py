"""Users' own models, without any distillation: `models` makes one of `module:factory` and its inputs, `data` reads what they are shown, `files`
quantizes an ONNX file and compares it with itself."""
