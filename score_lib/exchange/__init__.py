"""Models in the layouts of other libraries, read and written.  The door is `models.foreign`.

- `diffusers`: pipelines of Diffusers; `folders`: their files; `schedulers`: their processes;
  `unet_configs`, `unet_names`: their networks
- `adm`: files of guided diffusion
- `errors`: of such files, and the check of their options
"""
