"""Images of every kind as batches of tensors, in an order that can be resumed exactly.

- `loading`: from a config to the streams and sources of a data set, from a path to inputs and masks
- `stream`: a source as shuffled, flipped, dequantized batches
- `sources`: examples by number, as uint8, the same on every call
- `images`, `arrays`: the user's own files; `digits`, `public`, `tfrecords`: known data sets
- `preprocess`: crops and resizing
- `prepare`: downloads a public data set (a command)
"""
