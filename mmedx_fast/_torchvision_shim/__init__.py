"""Lets what the default package index has for torchvision stand beside a CPU build of torch.

torchvision, torchaudio and torchcodec there are built against CUDA torch; vLLM requires all three.
Beside a CPU torch their compiled parts do not load, and then

- torchvision registers fake kernels for operators that were never declared, and its import ends in
  `RuntimeError: operator torchvision::nms does not exist`;
- torchaudio's import ends in `OSError: Could not load this library`;
- so does torchcodec's, where vLLM is prepared for an ImportError only.

vLLM and transformers import them with every model and use plain torch code of theirs (image
transforms) at most, never the compiled operators.

This folder is put on PYTHONPATH for child processes (`mmedx_fast._env.prepare_environment`), where
the interpreter runs `sitecustomize.py` at start-up. The work is in `mmedx_torch_companions.py`.
"""
