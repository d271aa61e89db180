"""ONNX export of the vision tower and the replay (floor 4). May be imported by the engine and above."""
