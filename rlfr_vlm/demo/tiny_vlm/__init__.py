"""The demo's model, a Qwen2.5-VL of 0.9M parameters, for `model.path:
package:rlfr_vlm.demo.tiny_vlm`; data/tiny_vlm.py of the repository trained it.
"""
