"""How good samples are: features, their statistics, and distances between them.

- `configured`: the feature extractor and the data statistics that a config selects
- `distances`: FID, KID, Inception Score, precision and recall, from features alone; `jackknife`:
  their standard errors
- `extractors`: the interface of networks that compute features; `inception`, `pretrained`,
  `classifiers`, `own`: the networks; `fidelity`: their parts of torch-fidelity;
  `vision_transformer`: that of DINOv2
- `stats`: features of a set of images as a file, with a record of the network that computed them;
  `moments`, `pixels`: their checks
- `samples`, `sliced`, `point_sets`, `series`: distances of other data, from their values alone;
  `two_sample`: kernel distances, also KID, with their errors; `estimates`: figures with a standard
  error
- `shares`: of classes, among samples and data
- `noise_scales`: noise levels that suit a data set
"""
