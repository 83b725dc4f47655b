"""Data sets: the images, the noise scales that suit them, and the training published for them.

Each function starts a config; `parts` does the rest.
"""

from ml_collections import ConfigDict

from configs.defaults import base


def cifar10_defaults() -> ConfigDict:
    """CIFAR-10, 32 px."""
    return _images("CIFAR10", 32)


def celeba_defaults() -> ConfigDict:
    """CelebA, 64 px."""
    config = _images("CELEBA", 64)
    config.model.sigma_max = 90.0
    config.sampling.snr = 0.17
    config.eval.update(begin_ckpt=1, enable_sampling=True)
    return config


def lsun_defaults(category: str = "", image_size: int = 256) -> ConfigDict:
    """One category of LSUN, such as "bedroom" or "church_outdoor"; "" leaves it to be named."""
    config = _large_images("LSUN", image_size)
    config.data.category = category
    return config


def celebahq_defaults(tfrecords_path: str, image_size: int = 256) -> ConfigDict:
    """CelebA-HQ from TFRecords."""
    config = _large_images("CelebAHQ", image_size)
    config.data.tfrecords_path = tfrecords_path
    if image_size > 256:  # the values for 1024 px
        config.model.sigma_max = 1348.0
        config.training.batch_size = 8
        config.sampling.snr = 0.15
        config.eval.update(begin_ckpt=1, batch_size=1024)
    return config


def ffhq_defaults(tfrecords_path: str, image_size: int = 256) -> ConfigDict:
    """FFHQ from TFRecords."""
    config = celebahq_defaults(tfrecords_path, image_size)
    config.data.dataset = "FFHQ"
    return config


def digits_defaults() -> ConfigDict:
    """The 8 px handwritten digits that come with scikit-learn, learnt in minutes on a CPU."""
    config = _images("DIGITS", 8)
    config.data.update(num_channels=1, random_flip=False, uniform_dequantization=True)
    config.data.update(num_workers=0, levels=17)
    # The two digits furthest apart differ by 4.8.
    config.model.update(sigma_max=5.0, dropout=0.0)
    config.sampling.num_steps = 500
    config.optim.update(lr=4e-3, warmup=100)
    config.training.update(n_iters=2000, eval_freq=100)
    config.training.update(snapshot_freq=2000, snapshot_freq_for_preemption=250)
    config.control.guidance_scale = 2.0
    config.eval.update(begin_ckpt=1, end_ckpt=1, loss_num_repeats=20, batch_size=512)
    config.eval.update(enable_bpd=True, bpd_num_repeats=1, enable_sampling=True, num_samples=512)
    return config


def color_digits_defaults() -> ConfigDict:
    """The same digits, each in a colour of its own."""
    config = digits_defaults()
    config.data.update(dataset="COLOR_DIGITS", num_channels=3, levels=0)
    config.model.sigma_max = 7.0  # the two furthest apart differ by 6.8
    # The features that come with the project are those of gray digits.
    config.eval.enable_sampling = False
    return config


def digits_classifier_defaults() -> ConfigDict:
    """The same digits, and how a small classifier of them is trained in a minute on a CPU."""
    config = digits_defaults()
    config.optim.lr = 2e-3
    config.training.update(n_iters=2500, snapshot_freq=2500)
    config.eval.accuracy_num_repeats = 20
    return config


def fashion_mnist_defaults() -> ConfigDict:
    """Fashion-MNIST, 28 px, and a training sized for two CPU cores.

    `python -m score_lib.data.prepare fashion_mnist` gets the data.
    """
    config = _fashion_mnist()
    config.optim.update(lr=1e-3, warmup=200, cooldown=2000)
    config.training.update(n_iters=4000, eval_freq=200, log_freq=50)
    config.training.update(snapshot_freq=4000, snapshot_freq_for_preemption=200)
    config.control.guidance_scale = 4.0
    config.eval.batch_size = 125  # features of more images leave the caches of a CPU
    return config


def fashion_mnist_classifier_defaults() -> ConfigDict:
    """Fashion-MNIST, and how a small classifier of it is trained."""
    config = fashion_mnist_defaults()
    config.training.update(n_iters=2000, snapshot_freq=2000)
    config.optim.cooldown = 1000
    return config


def large_fashion_mnist_defaults() -> ConfigDict:
    """Fashion-MNIST, and a training sized for a GPU."""
    config = _fashion_mnist()
    config.model.dropout = 0.1
    config.training.update(n_iters=200_000, snapshot_freq=50_000)
    config.eval.update(begin_ckpt=1, end_ckpt=4)
    return config


def _fashion_mnist() -> ConfigDict:
    config = _images("FASHION_MNIST", 28)
    # All shoes point to the left: mirrored ones would be other data.
    config.data.update(num_channels=1, random_flip=False, uniform_dequantization=True)
    config.data.update(path="data/fashion_mnist", num_workers=0)
    # The two images furthest apart differ by about 22.
    config.model.update(sigma_max=22.0, dropout=0.0)
    config.eval.update(begin_ckpt=1, end_ckpt=1, batch_size=500, extractor="fashion_mnist")
    config.eval.update(enable_bpd=True, bpd_num_repeats=1, bpd_num_images=1000, bpd_steps=48)
    config.eval.update(enable_sampling=True, num_samples=10_000)
    return config


def imagenet_defaults(image_size: int) -> ConfigDict:
    """ImageNet, whose folders are at `data.path`."""
    return _images("IMAGENET", image_size)


def images_defaults(image_size: int = 32) -> ConfigDict:
    """The user's own images; `data.path` says where they are."""
    return _images("IMAGES", image_size)


def arrays_defaults(shape: tuple[int, ...], kind: str = "") -> ConfigDict:
    """The user's own arrays of any shape; `data.path` says where they are.  Minutes on a CPU.

    Args:
        shape: of one example.
        kind: what it is, where the shape does not tell; see `data.kind`.
    """
    config = _images("ARRAYS", 1)  # the shape takes the place of the size
    config.data.update(shape=shape, kind=kind, random_flip=False, num_workers=0)
    # Data have a deviation of 1 in the network's range.
    config.model.update(sigma_data=1.0, dropout=0.0)
    config.optim.update(lr=2e-3, warmup=100)
    config.training.update(batch_size=256, n_iters=5000, eval_freq=500)
    config.training.update(snapshot_freq=5000, snapshot_freq_for_preemption=1000)
    config.sampling.num_samples = 256
    config.eval.update(begin_ckpt=1, end_ckpt=1, loss_num_repeats=10, batch_size=512)
    config.eval.update(enable_bpd=True, bpd_num_repeats=1, enable_sampling=True, num_samples=2000)
    return config


def _images(dataset: str, image_size: int) -> ConfigDict:
    config = base()
    config.data.update(dataset=dataset, image_size=image_size)
    return config


def _large_images(dataset: str, image_size: int) -> ConfigDict:
    """Images of about 256 px."""
    config = _images(dataset, image_size)
    config.model.update(sigma_max=378.0, num_scales=2000, dropout=0.0)
    config.training.update(batch_size=64, n_iters=2400001, snapshot_freq_for_preemption=5000)
    config.sampling.snr = 0.075
    config.eval.update(begin_ckpt=50, end_ckpt=96, batch_size=512, enable_sampling=True)
    return config
