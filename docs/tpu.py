# %% [markdown]
# # First minutes on a TPU
#
# This page uses JAX, as TPUs do today. It is also [a notebook](tpu.ipynb), for a machine with TPU chips, such as the
# hosted notebooks with one or eight of them. It also runs on GPUs and CPUs. It has not run on a TPU yet. It needs
# scikit-learn, JAX for the machine at hand, and this project: in a checkout, `pip install ".[jax]"`. It does not need
# TensorFlow.

# %%
import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax
import keras
import numpy as np
from sklearn.datasets import load_digits

from lars_keras import LARS, schedules
from lars_keras.report.noise import NoiseScaleLog
from lars_keras.training import Trainer

print(jax.device_count(), "devices:", jax.devices()[0].device_kind)

# %% [markdown]
# ## All devices
#
# Set the distribution before you make the model. With it, `model.fit` and `Trainer` divide each batch over all devices.

# %%
keras.utils.set_random_seed(0)
keras.distribution.set_distribution(keras.distribution.DataParallel())

# %% [markdown]
# ## Data
#
# Handwritten digits, each in 24 positions: 32,328 images for training, so that an epoch has several large batches.

# %%
digits = load_digits()
images = np.float32(np.pad(digits.images, ((0, 0), (2, 2), (2, 2))) / 16)[..., None]
labels = digits.target.astype("int32")
places = [(row, column) for row in range(-2, 3) for column in range(-2, 3) if (row, column) != (0, 0)]
train_images = np.concatenate([np.roll(images[:1347], place, (1, 2)) for place in places])
train_labels = np.tile(labels[:1347], len(places))
test_images, test_labels = images[1347:], labels[1347:]

# %% [markdown]
# ## Model and optimizer
#
# TPUs are fastest in `mixed_bfloat16`. The layer plan shows what LARS does to each variable.

# %%
BATCH, MICROBATCH, EPOCHS = 4096, 512, 12
updates = EPOCHS * (len(train_images) // BATCH)  # `Trainer` takes whole batches only
keras.config.set_dtype_policy("mixed_bfloat16")
layers = []
for filters in (32, 64):
    layers += [keras.layers.Conv2D(filters, 3, use_bias=False), keras.layers.BatchNormalization(momentum=0.9)]
    layers += [keras.layers.ReLU()]
head = [keras.layers.Flatten(), keras.layers.Dense(10, dtype="float32")]
model = keras.Sequential([keras.Input((12, 12, 1)), *layers, *head])
rate = schedules.WarmupPolynomial(peak=10.0, warmup_updates=updates // 10, total_updates=updates)
model.compile(
    LARS(rate, excluded_lr_scale=0.1),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    weighted_metrics=["accuracy"],
)
model.optimizer.build(model.trainable_variables)
for row in model.optimizer.layer_plan():
    print(f"{row.path:40} adapted {row.adapt!s:6} decayed {row.decay!s:6} rate x {row.lr_scale:g}")

# %% [markdown]
# ## Training, and how large the batch may be
#
# An update is a batch of 4,096 images. Each device takes micro-batches of 512, so the update is the same on one to
# eight devices. `noise_scale=True` measures the gradient noise scale on the way ([noise scale](noise_scale.md)).

# %%
trainer = Trainer(model, batch_size=BATCH, microbatch_size=MICROBATCH, noise_scale=True)
noise = NoiseScaleLog(trainer, update_freq=updates // 3)  # prints it
trainer.fit(train_images, train_labels, epochs=EPOCHS, callbacks=noise, verbose=0)
scores = trainer.evaluate(test_images, test_labels)
print(scores)

# %% [markdown]
# ## Next
#
# - The same on several hosts, on Cloud TPU or GKE: [several hosts](hosts.md)
# - ImageNet on a pod slice, by `train.py`: [devices](devices.md)
# - Does your model fit a slice, and how fast can it be? Ask the TPU compiler without a TPU: [pod check](pod.md)
