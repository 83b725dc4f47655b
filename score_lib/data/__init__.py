"""Data of every kind as batches of tensors, in an order that can be resumed exactly.

- `published`: the published calls, such as `get_dataset`
- `loading`: from a config to the streams and sources of a data set
- `inputs`: images and masks that a user hands in for editing
- `stream`: a source as shuffled, flipped, dequantized batches; `augment`: changes of images
- `sources`: examples by number, the same on every call
- `kinds`: images, vectors, series, ...; `standardization`: of continuous values
- `images`, `arrays`, `values`, `points`: the user's own files; `files`, `folders`, `splits`,
  `pixels`: how these are meant; `stored`, `point_files`: readers
- `huggingface`, `webdataset`: files of these packages, in `shards`; `tables`, `tars`: readers;
  `hub`: downloads
- `imagenet`: folders by WordNet id; `wordnet`: files that come with them
- `listing`, `index`, `names`: very many files are listed once
- `digits`, `public`, `tfrecords`, `quickdraw`: known data sets; `strokes`: drawings
- `archives`, `lmdbs`: public ones from their authors' files; `formats`: readers of these
- `preprocess`: crops and resizing
- `prepare`: gets a public data set (a command); `downloads`: its authors' files
- `export`: writes a data set as image files (a command)
"""
